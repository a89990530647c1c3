"""Does it fit the chip? Compiles every kernel ahead of time and reads what came out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from typing import NamedTuple

# Bytes of shared memory that one thread block may use, by architecture: the CUDA C++ Programming
# Guide, "Compute Capabilities", "Maximum amount of shared memory per thread block" in KiB.
_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: 1024 * kib for arch, kib in _LIMITS.items()}
# By default. CUDA first, as its seconds are told: nothing else may compile at that time.
ARCHS = {"cuda": (75, 80, 86, 89, 90, 100, 120), "triton": (80, 89, 90, 100, 120)}
_NAMES = {"cuda": "CUDA", "triton": "Triton"}
_NO_PRODUCT = ("pool", "dgelu", "bias_grad")  # kernels that multiply no matrices

# PTX of a matrix product on tensor cores, the newest first: sm_90 knows mma.sync as well.
_TENSOR_CORES = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


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


def tensor_core(ptx: str) -> str | None:
    """The family of instructions that multiply matrices in ``ptx``."""
    return next((name for op, name in _TENSOR_CORES.items() if op in ptx), None)


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
