"""What is a geometry called, and which matrix does the name mean?

A name is a string, because torch.compile takes it for constant even where it lets integers vary:

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

from ..checks import check_count
from . import axes
from .table import Pair, Table

MAX_TOKENS = 2**31 - 1  # the tables index with int32
Grid = tuple[int, ...]


def adaptive(grid_in: Grid, grid_out: Grid) -> str:
    return f"adaptive {_join(grid_in)} {_join(grid_out)}"


def bilinear(grid_in: Grid, grid_out: Grid, align_corners: bool = False) -> str:
    return f"bilinear {_join(grid_in)} {_join(grid_out)} {_CORNERS[bool(align_corners)]}"


def fixed(
    grid_in: Grid,
    kernel: Grid,
    stride: Grid,
    padding: Grid,
    ceil_mode: bool,
    count_include_pad: bool,
) -> str:
    """The name, with the grid of outputs that torch's avg_pool makes.

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
        grid_out.append(last + (last * s < n + p))  # the last window must start inside
    words = map(_join, (grid_in, grid_out, kernel, stride, padding))
    return " ".join(["fixed", *words, _CEIL[bool(ceil_mode)], _COUNT[bool(count_include_pad)]])


def options(geometry: str) -> tuple[str, Grid, Grid, tuple]:
    """Kind, grid of tokens in, grid of tokens out and the other arguments of a geometry's name."""
    kind, *words = geometry.split()
    if kind == "identity":
        grid = (int(words[0]),)
        return kind, grid, grid, ()
    grid_in, grid_out, *rest = words
    if kind == "fixed":
        sizes = tuple(_split(word) for word in rest[:3])
        rest = (*sizes, rest[3] == _CEIL[True], rest[4] == _COUNT[True])
    elif kind == "bilinear":
        rest = (rest[0] == _CORNERS[True],)
    return kind, _split(grid_in), _split(grid_out), tuple(rest)


class Shape(NamedTuple):
    """What a geometry's tables measure: their rows, and their widths."""

    n_out: int
    n_in: int
    widths: tuple[int, int]


@lru_cache(maxsize=4096)
def shape(geometry: str) -> Shape:
    _, grid_in, grid_out, _ = options(geometry)
    widths = (prod(table.index.shape[1] for table in side) for side in _axes(geometry))
    return Shape(prod(grid_out), prod(grid_in), tuple(widths))


def tables(geometry: str, dtype: torch.dtype) -> Pair:
    """Rows and columns of a geometry's matrix, on the CPU, with weights of ``dtype``."""
    return table(geometry, 0, dtype), table(geometry, 1, dtype)


def table(geometry: str, side: int, dtype: torch.dtype) -> Table:
    """Its rows (side 0), which carry the name, or its columns (side 1)."""
    _, *grids, _ = options(geometry)
    return axes.product(_axes(geometry)[side], grids[side], dtype, "" if side else geometry)


def _axes(geometry: str) -> tuple[tuple[Table, ...], tuple[Table, ...]]:
    """The rows of every axis, and the columns of every axis."""
    kind, grid_in, grid_out, rest = options(geometry)
    if kind == "fixed":
        *sizes, _, include = rest
        arguments = ((*size, include) for size in zip(*sizes, strict=True))
    else:
        arguments = (rest for _ in grid_in)
    make = {"adaptive": axes.adaptive, "bilinear": axes.linear, "fixed": axes.fixed}.get(
        kind,
        axes.adaptive,  # which is the identity from n to n
    )
    pairs = [
        axes.pair(make, n_in, n_out, *args)
        for n_in, n_out, args in zip(grid_in, grid_out, arguments, strict=True)
    ]
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


def _join(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _split(word: str) -> Grid:
    return tuple(map(int, word.split("x")))


_CEIL, _COUNT, _CORNERS = ("floor", "ceil"), ("exclude", "include"), ("centers", "corners")
