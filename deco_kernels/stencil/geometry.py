"""What is a geometry called, and which matrix does it mean?

A geometry is a kind and integers, which torch.compile may let vary; its name is for people:

    identity 5
    adaptive 24x24 12x12
    fixed 24x24 12x12 3x3 2x2 1x1 floor include      (kernel, stride, padding, ceil_mode, count)
    bilinear 24x24 12x12 corners                     (or: centers)
"""

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch

from . import axes
from .numbers import check_count
from .table import Pair, Table

MAX_TOKENS = 2**31 - 1  # the tables index with int32
Grid = tuple[int, ...]


class Geometry(NamedTuple):
    """A pooling of one grid, as an operator takes it: a string and a flat list of integers.

    ``kind`` is the first word of the name, and those that are no sizes; ``sizes`` are all sizes of
    the name, those of the grid of tokens in and of tokens out first.
    """

    kind: str
    sizes: tuple[int, ...]

    def parts(self) -> list[Grid]:
        """The sizes by axis: grid in, grid out; of "fixed" also kernel, stride and padding."""
        sizes, words = tuple(self.sizes), self.kind.split(" ")
        if words[0] == "identity":
            return [sizes, sizes]
        count = 5 if words[0] == "fixed" else 2
        axes = len(sizes) // count
        return [sizes[i * axes : (i + 1) * axes] for i in range(count)]

    def __str__(self) -> str:
        kind, *words = self.kind.split(" ")
        grids = self.parts()[: 1 if kind == "identity" else None]
        return " ".join([kind, *("x".join(map(str, grid)) for grid in grids), *words])


def identity(n: int) -> Geometry:
    return Geometry("identity", (n,))


def adaptive(grid_in: Grid, grid_out: Grid) -> Geometry:
    return Geometry("adaptive", (*grid_in, *grid_out))


def bilinear(grid_in: Grid, grid_out: Grid, align_corners: bool = False) -> Geometry:
    words = "bilinear corners" if align_corners else "bilinear centers"
    return Geometry(words, (*grid_in, *grid_out))


def fixed(
    grid_in: Grid,
    kernel: Grid,
    stride: Grid,
    padding: Grid,
    ceil_mode: bool,
    count_include_pad: bool,
) -> Geometry:
    """With the grid of outputs that torch's avg_pool makes.

    Raises:
        ValueError: no window fits, or the padding is more than half a window.
    """
    grid_out = []
    for i, (n, k, s, p) in enumerate(zip(grid_in, kernel, stride, padding, strict=True)):
        if 2 * p > k:
            raise ValueError(f"padding[{i}] must be at most half of kernel[{i}] = {k}, got {p}")
        last = (n + 2 * p - k + (s - 1 if ceil_mode else 0)) // s
        if last < 0:
            raise ValueError(
                f"kernel[{i}] must fit grid_in[{i}] = {n} with padding {p} on both sides, got {k}"
            )
        # The last window must start inside.
        grid_out.append(last + 1 if last * s < n + p else last)
    kind = "fixed ceil" if ceil_mode else "fixed floor"
    kind += " include" if count_include_pad else " exclude"
    return Geometry(kind, (*grid_in, *grid_out, *kernel, *stride, *padding))


class Shape(NamedTuple):
    """What a geometry's tables measure: their rows, and their widths."""

    n_out: int
    n_in: int
    widths: tuple[int, int]


@lru_cache(maxsize=4096)
def shape(geometry: Geometry) -> Shape:
    grid_in, grid_out, *_ = geometry.parts()
    widths = (prod(table.index.shape[1] for table in side) for side in _axes(geometry))
    return Shape(prod(grid_out), prod(grid_in), tuple(widths))


def tables(geometry: Geometry, dtype: torch.dtype) -> Pair:
    """Rows and columns of a geometry's matrix, on the CPU, with weights of ``dtype``."""
    return table(geometry, 0, dtype), table(geometry, 1, dtype)


def table(geometry: Geometry, side: int, dtype: torch.dtype) -> Table:
    """Its rows (side 0), which carry the geometry, or its columns (side 1)."""
    grids = geometry.parts()
    own = None if side else geometry
    return axes.product(_axes(geometry)[side], grids[side], dtype, own)


def _axes(geometry: Geometry) -> tuple[tuple[Table, ...], tuple[Table, ...]]:
    """The rows of every axis, and the columns of every axis."""
    kind, *words = geometry.kind.split(" ")
    make, same = {
        "adaptive": (axes.adaptive, ()),
        "bilinear": (axes.linear, (words[-1:] == ["corners"],)),
        "fixed": (axes.fixed, (words[-1:] == ["include"],)),
        "identity": (axes.adaptive, ()),  # from n to n
    }[kind]
    pairs = [axes.pair(make, *sizes, *same) for sizes in zip(*geometry.parts(), strict=True)]
    rows, columns = zip(*pairs, strict=True)
    return rows, columns


def check_grid(name: str, grid: Sequence[int], like: Grid | None = None) -> Grid:
    """One to three positive sizes; as many as ``like`` has.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if not isinstance(grid, Sequence) or isinstance(grid, str) or not 1 <= len(grid) <= 3:
        raise ValueError(f"{name} must be 1 to 3 sizes such as (height, width), got {grid!r}")
    if like is not None and len(grid) != len(like):
        raise ValueError(f"{name} must have {len(like)} sizes as grid_in has, got {grid!r}")
    return tuple([check_count(f"{name}[{i}]", n) for i, n in enumerate(grid)])


def check_per_axis(name: str, value: int | Sequence[int], axes: int, least: int) -> Grid:
    """A size of at least ``least`` for every axis; one int counts for all."""
    values = value if isinstance(value, Sequence) else (value,) * axes
    if len(values) != axes:
        raise ValueError(f"{name} must be an int or {axes} of them, got {value!r}")
    return tuple(check_count(f"{name}[{i}]", n, least) for i, n in enumerate(values))


def check_tokens(what: str, count: int) -> int:
    """A count of tokens that an int32 can index."""
    if count > MAX_TOKENS:
        raise ValueError(f"{what} has {count} tokens, but the tables index at most {MAX_TOKENS}")
    return count
