"""Does it fit the chip? Compiles every kernel ahead of time and reads what came out."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import chain
from json import dumps
from typing import NamedTuple

from ...kernels.resources import SHARED_LIMIT

HELP = "compile every kernel ahead of time; needs no GPU"
# By default. CUDA first, as its seconds are told: nothing else may compile at that time.
ARCHS = {"cuda": (75, 80, 86, 89, 90, 100, 120), "triton": (80, 89, 90, 100, 120)}
_NAMES = {"cuda": "CUDA", "triton": "Triton"}
_NO_PRODUCT = ("pool", "dgelu", "bias_grad")  # kernels that multiply no matrices


@dataclass(frozen=True)
class Row:
    """One kernel, compiled for one architecture in the form that one case launches.

    ``spill_bytes`` is the stack frame of a thread. These kernels keep no arrays, so all of it is
    spilled registers, and it is 0 exactly where ptxas reports no spill. ``shared_bytes`` and
    ``shared_limit`` count a thread block, ``registers`` a thread. ``tensor_core`` is the family of
    instructions of its matrix products: "mma.sync", "wgmma", "tcgen05", or None. ``compiler`` is
    who compiled it, such as "Triton 3.8.0".
    """

    kernel: str
    backend: str
    arch: int
    config: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    shared_limit: int
    tensor_core: str | None
    case: str
    compiler: str

    @property
    def problems(self) -> list[str]:
        """Why this must not ship; empty if it may."""
        found = []
        if self.spill_bytes:
            found.append(f"spills {self.spill_bytes} bytes")
        if self.shared_bytes > self.shared_limit:
            found.append(f"{self.shared_bytes} of {self.shared_limit} bytes of shared memory")
        if self.kernel not in _NO_PRODUCT and self.tensor_core is None:
            found.append("no tensor cores")
        return found


class Step(NamedTuple):
    """What was compiled at once: its rows, and a line on what they do not say."""

    rows: list[Row]
    line: str = ""


class Table(NamedTuple):
    """Every kernel that can be compiled here."""

    steps: Iterator[Step]  # compiles as it goes
    total: int  # of them
    notes: list[str]  # what is not listed, and why


def table(archs: Sequence[int] | None = None) -> Table:
    """The kernels of both backends for ``archs``, by default for those in ``ARCHS``.

    Raises:
        ValueError: an architecture is not known; lists those that are.
        RuntimeError: nothing can be compiled here; says why.
    """
    unknown = [str(arch) for arch in archs or () if arch not in SHARED_LIMIT]
    if unknown:
        known = ", ".join(map(str, SHARED_LIMIT))
        raise ValueError(f"unknown arch {', '.join(unknown)}; known are {known}")
    parts, notes = [], []
    for backend, default in ARCHS.items():
        by_problem: dict[str | None, list[int]] = {}
        for arch in default if archs is None else archs:
            if arch >= default[0]:
                by_problem.setdefault(problem(backend, arch), []).append(arch)
        possible = by_problem.pop(None, [])
        if possible:
            parts.append((import_module(f".{backend}", __name__), possible))
        for why, without in by_problem.items():
            only = f" for {', '.join(f'sm_{arch}' for arch in without)}" if possible else ""
            notes.append(f"{_NAMES[backend]} kernels are not listed{only}: {why}")
    if not parts:
        raise RuntimeError("; ".join(notes))
    steps = chain.from_iterable(module.steps(possible) for module, possible in parts)
    total = sum(module.count_steps(possible) for module, possible in parts)
    return Table(steps, total, notes)


def problem(backend: str, arch: int) -> str | None:
    """Why a backend's kernels cannot be compiled here for ``arch``; None if they can."""
    try:
        module = import_module(f".{backend}", __name__)
    except ImportError as error:
        return f"{error.name} cannot be imported ({error})"
    return module.problem(arch)


def _aligned(rows: Sequence[Row]) -> str:
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


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "compute capabilities; default: 80,89,90,100,120, and 75,86 for the CUDA kernels"
    parser.add_argument("--arch", type=_archs, help=text)
    parser.add_argument("--json", action="store_true", help="print rows as JSON")


def _archs(text: str) -> list[int]:
    try:
        return [int(arch) for arch in text.split(",")]
    except ValueError:
        message = f"{text!r} is not a list of compute capabilities such as 80,90"
        raise argparse.ArgumentTypeError(message) from None


def main(arch: Sequence[int] | None = None, json: bool = False) -> int:
    found = table(arch)
    for note in found.notes:
        print(f"deco_kernels: {note}", file=sys.stderr)
    rows, lines = [], []
    for done, step in enumerate(found.steps, start=1):
        rows += step.rows
        lines += [step.line] if step.line else []
        if not json:
            print(f"\rcompiled {done} of {found.total}", end="", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: row.arch)
    if json:
        print(dumps([asdict(row) for row in rows], indent=1))
    else:
        print(file=sys.stderr)
        print("\n".join([_aligned(rows), *lines]))
    return 1 if any(row.problems for row in rows) else 0
