"""Which windows, where tokens say their own positions and some are padding?"""

from typing import NamedTuple

import torch

from .geometry import MAX_TOKENS, check_tokens
from .packed import check_cpu_integers
from .table import Pair, table, transposed

PADDING = -1


class Cells(NamedTuple):
    """Of every token of the flattened batch its output, or -1; and the outputs of every sample.

    ``whole``: whether no cell misses a token.
    """

    output: torch.Tensor
    lengths: tuple[int, ...]
    whole: bool


def cells(position_ids: torch.Tensor, kernel: int) -> Cells:
    """Check position ids [B, N, 2] or [N, 2] and number their kernel x kernel cells."""
    if not isinstance(position_ids, torch.Tensor):
        raise TypeError(f"position_ids must be a tensor, got {type(position_ids).__name__}")
    check_cpu_integers("position_ids", position_ids)
    shape = list(position_ids.shape)
    if len(shape) not in (2, 3) or shape[-1] != 2 or 0 in shape:
        raise ValueError(f"position_ids must be [batch, tokens, 2] or [tokens, 2], got {shape}")
    ids = position_ids.long().reshape(-1, *shape[-2:])
    batch, tokens, _ = ids.shape
    check_tokens("position_ids", batch * tokens)
    padding = (ids == PADDING).all(-1)
    outside = ((ids < 0) | (ids >= MAX_TOKENS)).any(-1) & ~padding
    _refuse(outside, ids, f"must be (x, y) from 0 to {MAX_TOKENS - 1}, or (-1, -1) for padding")
    x, y = ids.masked_fill(padding[..., None], 0).unbind(-1)
    width, height = x.amax(1) + 1, y.amax(1) + 1
    real = tokens - padding.sum(1)
    across, down = width // kernel, -(-height // kernel)
    for i, (count, w, a, d) in enumerate(_lists(real, width, across, down)):
        if not count:
            raise ValueError(f"position_ids of image {i} are all padding")
        if w % kernel:
            raise ValueError(
                f"kernel must divide the width of every image: image {i} is {w} tokens wide,"
                f" kernel is {kernel}"
            )
        if a * d > count:
            raise ValueError(
                f"position_ids of image {i}: its {count} tokens cannot fill {a * d} cells of"
                f" {kernel}x{kernel}; its largest ids are ({w - 1}, {int(height[i]) - 1})"
            )
    lengths = across * down
    first = lengths.cumsum(0) - lengths
    n_out = check_tokens("the pooled batch", int(lengths.sum()))
    # Every token's place among its output's kernel * kernel: twice the same is a duplicate.
    output = first[:, None] + y // kernel * across[:, None] + x // kernel
    place = (output * kernel + y % kernel) * kernel + x % kernel
    _refuse(_repeated(place, padding), ids, "must differ within an image")
    output = output.masked_fill(padding, -1).flatten()
    filled = torch.bincount(output[output >= 0], minlength=n_out)
    if not filled.all():
        o = int((filled == 0).nonzero()[0])
        i = int((first <= o).nonzero()[-1])
        row, column = divmod(o - int(first[i]), int(across[i]))
        raise ValueError(
            f"position_ids of image {i} leave an output without tokens: x from"
            f" {column * kernel}, y from {row * kernel}, kernel {kernel}"
        )
    return Cells(output, tuple(lengths.tolist()), bool((filled == kernel**2).all()))


def tables(output: torch.Tensor, n_out: int, kernel: int) -> Pair:
    """Rows and columns in float64; every token weighs 1 / kernel**2, however many a cell has."""
    weight = (output >= 0).double()[:, None] / kernel**2
    columns = table(output.clamp(min=0)[:, None], weight)
    return transposed(columns.index, columns.weight, n_out), columns


def _repeated(place: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
    """Which tokens [B, N] have the place of an earlier one."""
    flat = place.masked_fill(padding, -1).flatten()
    ordered, order = torch.sort(flat, stable=True)
    again = torch.zeros_like(flat, dtype=torch.bool)
    again[order[1:]] = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    return again.view_as(place)


def _refuse(bad: torch.Tensor, ids: torch.Tensor, rule: str) -> None:
    if bad.any():
        i, token = bad.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids {rule}: image {i}, token {token} has {tuple(ids[i, token].tolist())}"
        )


def _lists(*columns: torch.Tensor) -> list[list[int]]:
    return torch.stack(columns, 1).tolist()
