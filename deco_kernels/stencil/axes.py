"""Which windows along one axis? A geometry's matrix is the Kronecker product of its axes'."""

from collections.abc import Callable, Hashable, Sequence
from math import prod

import torch

from .kept import Kept
from .table import CPU, Pair, Table, bytes_of, check_entries, table, transposed


def adaptive(n_in: int, n_out: int) -> Table:
    """Output o averages inputs ``floor(o*in/out)`` up to ``ceil((o+1)*in/out)``."""
    o = torch.arange(n_out, device=CPU)[:, None]
    return _average(o * n_in // n_out, -(-(o + 1) * n_in // n_out))


def fixed(
    n_in: int, n_out: int, kernel: int, stride: int, padding: int, count_include_pad: bool
) -> Table:
    """Output o averages ``kernel`` inputs from ``o*stride - padding`` on, as torch's avg_pool.

    With ``count_include_pad`` the padding counts as zeros, but not what ``ceil_mode`` adds
    beyond it: https://docs.pytorch.org/docs/stable/generated/torch.nn.AvgPool2d.html
    """
    start = torch.arange(n_out, device=CPU)[:, None] * stride - padding
    end = (start + kernel).clamp(max=n_in + padding)
    divisor = end - start
    start, end = start.clamp(min=0), end.clamp(max=n_in)
    return _average(start, end, divisor if count_include_pad else end - start)


def linear(n_in: int, n_out: int, align_corners: bool) -> Table:
    """Output o lies between its two nearest inputs, as in ``F.interpolate(mode="linear")``."""
    o = torch.arange(n_out, dtype=torch.double, device=CPU)
    if align_corners:
        at = o * ((n_in - 1) / (n_out - 1) if n_out > 1 else 0)
    else:
        at = ((o + 0.5) * (n_in / n_out) - 0.5).clamp(min=0)
    left = at.long().clamp(max=n_in - 1)
    right_weight = torch.where(left < n_in - 1, at - left, 0)
    if not right_weight.any():
        return table(left[:, None], at.new_ones(n_out, 1))
    # Where the right input has no weight, its place repeats the left one.
    index = torch.stack([left, left + (right_weight > 0)], 1)
    return table(index, torch.stack([1 - right_weight, right_weight], 1))


def _average(start: torch.Tensor, end: torch.Tensor, divisor: torch.Tensor | None = None) -> Table:
    """Windows [n_out, 1] ``start`` up to ``end``; the padding repeats the last input."""
    divisor = end - start if divisor is None else divisor
    index = start + torch.arange(int((end - start).max()), device=CPU)
    inside = index < end
    return table(index.minimum(end - 1), inside.double() / divisor)


_kept = Kept(bytes_of)


def pair(axis: Callable[..., Table], n_in: int, *args: int | bool) -> Pair:
    """The rows of an axis and its columns, weights in float64."""

    def make() -> Pair:
        rows = axis(n_in, *args)
        return rows, transposed(rows.index, rows.weight, n_in)

    return _kept.get((axis, n_in, *args), make)


def product(
    axes: Sequence[Table], spans: Sequence[int], dtype: torch.dtype, geometry: Hashable
) -> Table:
    """The Kronecker product of tables that read ``spans`` rows, the last axis running fastest."""
    check_entries(*(prod(axis.index.shape[side] for axis in axes) for side in (0, 1)))
    index, weight = axes[0].index, axes[0].weight
    for axis, span in zip(axes[1:], spans[1:], strict=True):
        index = (index * span)[:, None, :, None] + axis.index[:, None]
        index = index.flatten(2).flatten(0, 1)
        weight = torch.kron(weight, axis.weight)
    return Table(index, weight.to(dtype), any(axis.ragged for axis in axes), geometry)
