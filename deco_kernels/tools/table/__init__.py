"""Which tiles should ship? The fastest by the model that the compiler has nothing against."""

import argparse
import sys
from pathlib import Path

from ..compile import problem
from . import rank

HELP = "choose tiles by the model and the compile facts; no GPU"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="the table's file to write; default: none")


def main(out: Path | None = None) -> int:
    """Print the choice, and write it to ``out``.

    Raises:
        RuntimeError: a file is wanted, and nothing can be compiled here; or no candidate ships.
    """
    missing = problem("triton", 80)
    if missing and out:
        raise RuntimeError(f"no table is written of what nothing has compiled: {missing}")
    if missing:
        print(f"deco_kernels: as ranked, nothing is compiled: {missing}", file=sys.stderr)
        print("\n".join(rank.firsts()))
        return 0
    from . import search  # with Triton

    found = []
    for verdict in search.verdicts():
        print(verdict, flush=True)
        found.append(verdict)
    if out:
        out.write_text(search.as_json(found), encoding="utf-8")
    return 0
