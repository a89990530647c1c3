"""The static table: a configuration for each kernel, element size and architecture.

`python -m deco_kernels table --out deco_kernels/tuning/table.json` writes it: products by the
model's rank and what the compiler says, the rest from constants. Nothing here depends on the number
of images or tokens, so that a new batch size never compiles anew.
"""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

from ..kernels.launch import Config

FILE = Path(__file__).with_name("table.json")


@dataclass(frozen=True)
class Refused:
    """A configuration that must not ship, its predicted microseconds, and what is wrong with it."""

    config: Config
    us: float
    reason: str


@dataclass(frozen=True)
class Entry:
    """What a kernel is launched with, for elements of ``itemsize`` bytes on ``arch``.

    Attributes:
        us: predicted, over the shapes and chips it was ranked by; None: the model did not choose.
        refused: the faster ones, the fastest first.
    """

    arch: int
    kernel: str
    itemsize: int
    config: Config
    us: float | None = None
    refused: tuple[Refused, ...] = ()


def dump(entries: Sequence[Entry], triton: str) -> str:
    """The text of the file, a line an entry; ``triton`` is the version that compiled."""
    lines = ",\n".join(json.dumps(asdict(entry)) for entry in entries)
    return f'{{"triton": {json.dumps(triton)}, "entries": [\n{lines}\n]}}\n'


def load(text: str) -> list[Entry]:
    """The entries that :func:`dump` wrote."""

    def parsed(cls: type, fields: dict) -> Entry | Refused:
        return cls(**fields | {"config": Config(**fields["config"])})

    found = []
    for fields in json.loads(text)["entries"]:
        refused = tuple(parsed(Refused, each) for each in fields["refused"])
        found.append(parsed(Entry, fields | {"refused": refused}))
    return found


@cache
def made_with() -> str:
    """The version of Triton that compiled the candidates."""
    return json.loads(FILE.read_text(encoding="utf-8"))["triton"]


@cache
def _entries() -> dict[tuple[str, int, int], Entry]:
    entries = load(FILE.read_text(encoding="utf-8"))
    return {(entry.kernel, entry.itemsize, entry.arch): entry for entry in entries}


def listed(arch: int, archs: Collection[int]) -> int:
    """Whose entries ``arch`` takes, of ``archs``.

    Its own, else the next one above of the same major version, else the last of that version, else
    the last one below. Before all of them, where no kernel runs: the first.
    """
    same = [each for each in archs if each // 10 == arch // 10]
    above = [each for each in same if each >= arch]
    if above:
        return min(above)
    return max(same or [each for each in archs if each < arch], default=min(archs))


@cache
def _entry(kernel: str, itemsize: int, arch: int) -> Entry:
    entries = _entries()
    return entries[kernel, itemsize, listed(arch, {each for _, _, each in entries})]


_overrides: dict[tuple[str, int], Config] = {}


@contextmanager
def override(kernel: str, itemsize: int, config: Config) -> Iterator[None]:
    """Launch ``kernel`` with ``config`` in place of what ships; for tools, not for threads."""
    before = _overrides.copy()
    _overrides[kernel, itemsize] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def config_for(kernel: str, dtype: torch.dtype, arch: int) -> Config:
    """The configuration of a kernel, by its name, for elements of ``dtype`` on ``arch``."""
    itemsize = dtype.itemsize
    return _overrides.get((kernel, itemsize)) or _entry(kernel, itemsize, arch).config


def refused_for(kernel: str, dtype: torch.dtype, arch: int) -> tuple[Refused, ...]:
    """What should be faster than :func:`config_for`, but must not ship; the fastest first."""
    return _entry(kernel, dtype.itemsize, arch).refused
