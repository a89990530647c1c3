"""Is it a count, a grid, a square? Checked before anything is made of it."""

import math
import operator
from collections.abc import Sequence

import torch


def check_count(name: str, value: object, least: int = 1) -> int:
    """An integer of at least ``least``, of Python's or any other kind of int."""
    if type(value) is not int:  # which torch.compile may let vary
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            kind = type(value).__name__
            raise TypeError(f"{name} must be an int, got {kind} {value!r}") from None
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


def check_grid(name: str, grid: Sequence[int]) -> tuple[int, int]:
    """A pair (height, width) of positive integers."""
    if not isinstance(grid, Sequence) or len(grid) != 2:
        raise ValueError(f"{name} must be a pair (height, width), got {grid!r}")
    return check_count(f"{name}[0]", grid[0]), check_count(f"{name}[1]", grid[1])


def square_side(name: str, count: int, hint: str = "") -> int:
    """The side of a square grid of ``count`` tokens."""
    side = whole_root(count)
    if side < 1 or side * side != count:
        raise ValueError(f"{name} must be a positive square number, got {count}{hint}")
    return side


def whole_root(count: int) -> int:
    """The square root, rounded down; torch.compile lets the count vary, as in the reference."""
    return int(count**0.5) if torch.compiler.is_compiling() else math.isqrt(count)
