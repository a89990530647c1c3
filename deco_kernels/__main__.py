"""What can I ask of it? ``python -m deco_kernels info``, ``check``, ``compile``, ``predict``..."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .backends import BACKENDS
from .tools import predict as tables
from .tuning.chips import CHIPS

if TYPE_CHECKING:
    from .tools.compile import Row

# A command imports its module when it runs: `info` must work where Triton or the demo's
# dependencies are missing.


def _info(options: dict[str, Any]) -> int:
    from .tools.info import report

    print(report())
    return 0


def _check(options: dict[str, Any]) -> int:
    from .tools.check import run

    return 0 if run(**options) else 1


def _compile(options: dict[str, Any]) -> int:
    from .tools import compile as aot

    table, as_json = aot.table(options.get("arch")), options["json"]
    for note in table.notes:
        print(f"deco_kernels: {note}", file=sys.stderr)
    rows, lines = [], []
    for done, step in enumerate(table.steps, start=1):
        rows += step.rows
        lines += [step.line] if step.line else []
        if not as_json:
            print(f"\rcompiled {done} of {table.total}", end="", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.arch)
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(file=sys.stderr)
        print("\n".join([_table(rows), *lines]))
    return 1 if any(row.problems for row in rows) else 0


def _table(rows: "Sequence[Row]") -> str:
    """An aligned table, one line a row, and a summary."""
    columns = "arch backend kernel case config regs spill shared limit cores"
    cells = [(*columns.split(), "")]
    for row in rows:
        sizes = row.registers, row.spill_bytes, row.shared_bytes, row.shared_limit
        problems = f"! {', '.join(row.problems)}" if row.problems else ""
        cores = row.tensor_core or "-"
        head = f"sm_{row.arch}", row.backend, row.kernel, row.case, row.config
        cells.append((*head, *map(str, sizes), cores, problems))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        aligned = [
            cell.rjust(width) if 5 <= i < 9 else cell.ljust(width)  # sizes to the right
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(aligned).rstrip())
    bad = sum(bool(row.problems) for row in rows)
    if bad:
        lines.append(f"{bad} of {len(rows)} must not ship: see the lines with !")
    else:
        lines.append(f"all {len(rows)} fit: no spills, shared memory to spare, tensor cores")
    return "\n".join(lines)


def _predict(options: dict[str, Any]) -> int:
    print(tables.report(**options))
    return 0


def _tune(options: dict[str, Any]) -> int:
    from .tools.tune import run

    run(**options)
    return 0


def _choose(options: dict[str, Any]) -> int:
    from .tools import compile as aot
    from .tools.table import rank

    problem = aot.problem("triton", 80)
    if problem and "out" in options:
        raise RuntimeError(f"no table is written of what nothing has compiled: {problem}")
    if problem:
        print(f"deco_kernels: as ranked, nothing is compiled: {problem}", file=sys.stderr)
        print("\n".join(rank.firsts()))
        return 0
    from .tools.table import search

    found = []
    for verdict in search.verdicts():
        print(verdict, flush=True)
        found.append(verdict)
    if "out" in options:
        options["out"].write_text(search.as_json(found), encoding="utf-8")
    return 0


def _demo(options: dict[str, Any]) -> int:
    from .tools.demo import run

    run(**options)
    return 0


def _report(options: dict[str, Any]) -> int:
    from .tools.report import run

    return run(**options)


def _archs(text: str) -> list[int]:
    try:
        return [int(arch) for arch in text.split(",")]
    except ValueError:
        message = f"{text!r} is not a list of compute capabilities such as 80,90"
        raise argparse.ArgumentTypeError(message) from None


def _parser() -> argparse.ArgumentParser:
    text = "Fused average-pool projectors: what is here, is it right, does it fit, a demo."
    parser = argparse.ArgumentParser(prog="deco_kernels", description=text)
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        # What is not given is left to the defaults of the function that runs.
        added = commands.add_parser(
            name, help=text, description=text, argument_default=argparse.SUPPRESS
        )
        added.set_defaults(run=run)
        return added

    def where(added: argparse.ArgumentParser) -> None:
        added.add_argument("--device", help="such as cuda:1 or cpu")
        added.add_argument("--backend", choices=BACKENDS)

    command("info", _info, "versions, devices, and which backends are usable and why not")
    where(command("check", _check, "forward and every gradient against float64"))
    added = command("compile", _compile, "compile every kernel ahead of time; needs no GPU")
    help_arch = "compute capabilities; default: 80,89,90,100,120, and 75,86 for the CUDA kernels"
    added.add_argument("--arch", type=_archs, help=help_arch)
    added.add_argument("--json", action="store_true", default=False, help="print rows as JSON")
    added = command("predict", _predict, "predicted times on chips, and what is assumed for them")
    help_chips = f"of {', '.join(CHIPS)}; default: all"
    added.add_argument(
        "--chip",
        dest="chips",
        nargs="+",
        type=str.upper,
        choices=CHIPS,
        metavar="NAME",
        help=help_chips,
    )
    added.add_argument("--batch", type=int, help="images; default: 64")
    for each in dataclasses.fields(tables.Assumptions):
        text = f"{each.metadata['help']}; default: {each.default:g}"
        added.add_argument(f"--{each.name.replace('_', '-')}", type=float, metavar="X", help=text)
    added = command("tune", _tune, "measure every backend on this GPU, for backend auto to use")
    text = "patch tokens of an image; default: 24 24"
    added.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help=text)
    for name, default in (
        ("query_num", 144),
        ("mm_hidden_size", 1024),
        ("llm_hidden_size", 4096),
        ("layer_num", 2),
    ):
        text = f"of the projector; default: {default}"
        added.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    text = "images in a step; default: 1 8 64"
    added.add_argument("--batch", type=int, nargs="+", metavar="B", help=text)
    added.add_argument("--dtype", choices=("bfloat16", "float16", "tf32"))
    added.add_argument("--device", help="default: cuda:0")
    added.add_argument("--dry-run", action="store_true", help="print what would be measured")
    added = command("table", _choose, "choose tiles by the model and the compile facts; no GPU")
    added.add_argument("--out", type=Path, help="the table's file to write; default: none")
    added = command("demo", _demo, "train a tiny multimodal model with either projector, and plot")
    added.add_argument("--out", type=Path, help="the picture to write")
    added.add_argument("--steps", type=int)
    added.add_argument("--seed", type=int)
    where(added)
    text = "check, tests, tune and benchmarks here, in one report; takes minutes"
    added = command("report", _report, text)
    help_out = "a folder to make, or of an earlier report, whose files are then replaced"
    added.add_argument("--out", type=Path, required=True, metavar="DIR", help=help_out)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    try:
        return run(options)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        print(f"deco_kernels: error: {line}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
