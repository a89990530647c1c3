"""What can I ask of it? ``python -m deco_kernels info``, ``check``, ``compile``, ``predict``..."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each a module in tools/, which has HELP, arguments() and main().
COMMANDS = ("info", "check", "compile", "predict", "tune", "table", "demo", "report")


def _parser() -> argparse.ArgumentParser:
    text = "Fused average-pool projectors: what is here, is it right, does it fit, a demo."
    parser = argparse.ArgumentParser(prog="deco_kernels", description=text)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name in COMMANDS:
        tool = import_module(f"{__package__}.tools.{name}")
        # What is not given is left to the defaults of the function that runs.
        added = commands.add_parser(
            name, help=tool.HELP, description=tool.HELP, argument_default=argparse.SUPPRESS
        )
        tool.arguments(added)
        added.set_defaults(main=tool.main)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("main")
    try:
        return run(**options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"deco_kernels: error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
