"""How is a sparse matrix laid out? As two gather tables: its rows, and its columns."""

from collections.abc import Hashable, Sequence
from ctypes import string_at
from itertools import accumulate
from sys import byteorder
from typing import NamedTuple

import torch


class Table(NamedTuple):
    """One side of a stencil: for every output row the input rows it sums, and their weights.

    ``index`` [R, T] int32 and ``weight`` [R, T] (float32, or float64 for float64 tokens) on one
    device. T is the longest window; shorter ones are padded with weight 0 (and an index of the
    same window, if it has any), and then ``ragged`` is true. The first place of a window is never
    padding, so a row whose first weight is 0 has no tokens. ``geometry`` is what torch may have an
    operator for: that of a grid's rows, None for columns and for rows of anything else.
    """

    index: torch.Tensor
    weight: torch.Tensor
    ragged: bool
    geometry: Hashable = None

    def to(self, device: torch.device, dtype: torch.dtype, non_blocking: bool = False) -> "Table":
        """A copy there. ``non_blocking``: for the current stream, and the host does not wait."""
        pair = self.index, self.weight.to(dtype)
        if non_blocking and device.type == "cuda" and not torch.compiler.is_compiling():
            with torch.cuda.device(device):  # memory is pinned by one device's context
                pair = [t.pin_memory() for t in pair]  # copies of other memory wait for the stream
        index, weight = (t.to(device, non_blocking=non_blocking) for t in pair)
        return Table(index, weight, self.ragged, self.geometry)

    def widened(self, width: int) -> "Table":
        """The same rows, padded to ``width`` columns."""
        missing = width - self.index.shape[1]
        if not missing:
            return self
        last = self.index[:, -1:].expand(-1, missing)
        zeros = self.weight.new_zeros(1, 1).expand(len(last), missing)
        index, weight = torch.cat([self.index, last], 1), torch.cat([self.weight, zeros], 1)
        return Table(index, weight, True)


CPU = torch.device("cpu")  # said wherever a tensor is made: the caller may have another default
Pair = tuple[Table, Table]  # rows and columns of one matrix


def bytes_of(pair: Pair) -> int:
    return sum(table.index.nbytes + table.weight.nbytes for table in pair)


def check_entries(rows: int, width: int) -> None:
    """A table whose entries an int32 can count."""
    if rows * width > 2**31 - 1:
        raise ValueError(
            f"a table of {rows} rows, as wide as the widest window of {width} tokens, has more"
            f" entries than an int32 counts"
        )


def table(index: torch.Tensor, weight: torch.Tensor) -> Table:
    """A table of any integer indexes [R, T] and their weights, 0 where there is padding."""
    ragged = bool((weight == 0).any())
    return Table(index.int().contiguous(), weight.contiguous(), ragged)


def transposed(index: torch.Tensor, weight: torch.Tensor, n_in: int) -> Table:
    """The transpose of a table [R, T]: for every input token its outputs, in ascending order."""
    output, slot = torch.nonzero(weight, as_tuple=True)
    token, weight = index[output, slot].long(), weight[output, slot]
    order = torch.sort(token, stable=True).indices
    token, output, weight = token[order], output[order], weight[order]
    count = torch.bincount(token, minlength=n_in)
    first = count.cumsum(0) - count
    slot = torch.arange(len(token), device=CPU) - first[token]
    width = max(int(count.max()), 1)
    # Padding points at the token's own first output, so that no foreign value can leak in.
    own = output[first.clamp(max=len(output) - 1)]
    columns, weights = own[:, None].repeat(1, width), weight.new_zeros(n_in, width)
    columns[token, slot], weights[token, slot] = output, weight
    return table(columns, weights)


class Piece(NamedTuple):
    """A table's rows as bytes: joining hundreds of them takes half of torch.cat's time."""

    index: bytes
    weight: bytes
    ragged: bool


def piece(table: Table) -> Piece:
    index, weight = table.index.contiguous(), table.weight.contiguous()
    return Piece(*(string_at(t.data_ptr(), t.nbytes) for t in (index, weight)), table.ragged)


def concatenated(
    pieces: Sequence[Piece],
    heights: Sequence[int],
    spans: Sequence[int],
    width: int,
    dtype: torch.dtype,
) -> Table:
    """The block-diagonal matrix of tables of one width and dtype.

    ``pieces[i]`` has ``heights[i]`` rows and reads ``spans[i]`` rows.
    """
    starts = zip(accumulate(spans, initial=0), heights, strict=False)  # the last start has no piece
    index = _joined([p.index for p in pieces], torch.int32).view(-1, width)
    index += _joined([n.to_bytes(4, byteorder) * h for n, h in starts], torch.int32)[:, None]
    weight = _joined([p.weight for p in pieces], dtype).view(-1, width)
    return Table(index, weight, any(p.ragged for p in pieces))


def _joined(parts: Sequence[bytes], dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray().join(parts), dtype=dtype)
