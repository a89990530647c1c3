"""What does this machine make of it? A report: is it right, fast and lean here?"""

import argparse
from pathlib import Path

from .runner import run

__all__ = ["run"]
HELP = "check, tests, tune and benchmarks here, in one report; takes minutes"


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "a folder to make, or of an earlier report, whose files are then replaced"
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help=text)


def main(out: Path) -> int:
    return run(out)
