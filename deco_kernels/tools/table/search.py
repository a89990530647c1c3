"""Which configurations ship? The fastest by the model that the compiler has nothing against."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

import triton

from ...backends import triton as verbs
from ...kernels.launch import Chip, Config, stand_in
from ...tuning import table
from ...tuning.chips import CHIPS
from ..compile import triton as jit
from ..measure import float32_matmul
from . import rank


@dataclass(frozen=True)
class Verdict:
    """A candidate: ``us`` predicted microseconds, and why it must not ship, or None."""

    arch: int
    kernel: str
    itemsize: int
    config: Config
    us: float
    problem: str | None

    def __str__(self) -> str:
        where = f"sm_{self.arch} {self.kernel} {self.itemsize} bytes"
        return f"{where}  {self.config}  {self.us:.1f} us  {self.problem or 'ships'}"


def forms(kernel: str, itemsize: int) -> list[str]:
    """Cases that launch a kernel with its configuration for elements of ``itemsize`` bytes."""
    probe, found = rank.candidates(kernel, itemsize)[0], []
    for name, call in jit.cases().items():
        launched = []
        with (
            float32_matmul("tf32"),
            stand_in(Chip(80, 1), lambda *launch, into=launched: into.append(launch[2])),
            table.override(kernel, itemsize, probe),
        ):
            call()
        found += [name] * any(config is probe for config in launched)
    return found


def _problems(case: str, arch: int, kernel: str, itemsize: int, config: Config) -> list[str]:
    with table.override(kernel, itemsize, config):
        rows = jit.rows(case, arch)
    return [f"{each} in {case}" for row in rows if row.kernel == kernel for each in row.problems]


def verdicts() -> Iterator[Verdict]:
    """Candidates of every chip's architecture in the order of the model, to the first that ships.

    Compiles them in every form that ships, on several cores.

    Raises:
        RuntimeError: nothing can be compiled here, or no candidate ships.
    """
    archs = sorted({chip.arch for chip in CHIPS.values()})
    for arch in archs:
        reason = jit.problem(arch) or verbs.unfenced(arch)
        if reason:
            raise RuntimeError(reason)
    cases = {(kernel, size): forms(kernel, size) for kernel in rank.RANKED for size in rank.DTYPES}
    workers = min(os.cpu_count() or 1, jit.MOST_WORKERS)
    # Not forked: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for arch in archs:
            for (kernel, size), names in cases.items():
                for us, config in rank.ranked(kernel, size, arch):
                    told = partial(
                        _problems, arch=arch, kernel=kernel, itemsize=size, config=config
                    )
                    problem = next(
                        (each for found in pool.map(told, names) for each in found), None
                    )
                    yield Verdict(arch, kernel, size, config, us, problem)
                    if problem is None:
                        break
                else:
                    raise RuntimeError(f"no candidate for {kernel} on sm_{arch} ships")


def as_json(found: Iterable[Verdict]) -> str:
    """The table's file: what ships, what was refused before it, and the constants."""
    entries, refused = [], []
    for each in found:
        if each.problem is not None:
            refused.append(table.Refused(each.config, each.us, each.problem))
            continue
        key = each.arch, each.kernel, each.itemsize
        entries.append(table.Entry(*key, each.config, each.us, tuple(refused)))
        refused = []
    for arch in sorted({entry.arch for entry in entries}):
        for size in rank.DTYPES:
            constants = rank.constants(size).items()
            entries += [table.Entry(arch, kernel, size, config) for kernel, config in constants]
    entries.sort(key=lambda entry: (entry.arch, entry.kernel, entry.itemsize))
    return table.dump(entries, triton.__version__)
