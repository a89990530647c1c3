"""Which tokens, which weights? Every pooling is a sparse matrix ``P = S X``; this is S."""

import math
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .checks import check_grid


class Table(NamedTuple):
    """One side of a stencil: for every output row the input rows it sums, and their weights.

    ``index`` [R, T] int32 and ``weight`` [R, T] (float32, or float64 for float64 tokens) on one
    device. T is the longest window; shorter ones are padded with weight 0 (and an index of the
    same window), and then ``ragged`` is true. ``geometry`` names what torch has an operator for:
    the stencil's geometry for its rows, nothing for its columns.
    """

    index: torch.Tensor
    weight: torch.Tensor
    ragged: bool
    geometry: str

    def to(self, device: torch.device, dtype: torch.dtype) -> "Table":
        return self._replace(index=self.index.to(device), weight=self.weight.to(device, dtype))


class Stencil:
    """A pooling of ``n_in`` tokens to ``n_out`` tokens, as two gather tables.

    Build one with a constructor such as :meth:`Stencil.adaptive`. It is immutable and no more than
    the name of a geometry; the tables of a geometry are built once and kept on every device that
    asks for them.

    Attributes:
        geometry: the constructor and its arguments, as "adaptive 24x24 12x12".
        n_in: number of input tokens.
        n_out: number of output tokens.
    """

    __slots__ = ("geometry", "n_in", "n_out")

    def __init__(self, geometry: str, n_in: int, n_out: int) -> None:
        """For the constructors."""
        self.geometry, self.n_in, self.n_out = geometry, n_in, n_out

    def __repr__(self) -> str:
        return f"Stencil({self.geometry}: {self.n_in} -> {self.n_out} tokens)"

    @classmethod
    def adaptive(cls, grid_in: tuple[int, int], grid_out: tuple[int, int]) -> "Stencil":
        """Adaptive average pooling of an (h, w) grid, token order row by row.

        The windows are those of ``torch.nn.AdaptiveAvgPool2d``: output o of an axis averages
        inputs ``floor(o*in/out)`` up to ``ceil((o+1)*in/out)``. They may overlap, differ in size,
        and ``grid_out`` may be larger than ``grid_in``.

        Raises:
            TypeError, ValueError: a grid is not a pair of positive integers.
        """
        return cls.adaptive_checked(
            check_grid("grid_in", grid_in), check_grid("grid_out", grid_out)
        )

    @classmethod
    def adaptive_checked(cls, grid_in: tuple[int, int], grid_out: tuple[int, int]) -> "Stencil":
        """:meth:`adaptive` for grids that a caller has checked."""
        (h, w), (out_h, out_w) = grid_in, grid_out
        # A string, because torch.compile takes it for constant even where it lets integers vary.
        return cls(f"adaptive {h}x{w} {out_h}x{out_w}", h * w, out_h * out_w)

    def tables(
        self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float64
    ) -> tuple[Table, Table]:
        """The gather table of the pooled tokens [n_out, T], and its transpose [n_in, U].

        The transpose gathers the gradient of the input tokens, without atomics. ``dtype`` is that
        of the weights.
        """
        return _placed(self.geometry, torch.device(device), dtype)


_tables: dict[tuple[str, torch.device, torch.dtype], tuple[Table, Table]] = {}


@torch.compiler.assume_constant_result  # a compiled graph takes the tables as they are
def _placed(geometry: str, device: torch.device, dtype: torch.dtype) -> tuple[Table, Table]:
    key = geometry, device, dtype
    tables = _tables.get(key)
    if tables is None:
        # What is kept must serve every caller, whatever mode and default device this one is in.
        with _disable_current_modes(), torch.device("cpu"), torch.inference_mode(False):
            rows, columns = _build(geometry)
            tables = _tables[key] = rows.to(device, dtype), columns.to(device, dtype)
    return tables


def adaptive_grids(geometry: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The grids (h, w) of tokens in and out that an adaptive geometry names."""
    _, grid_in, grid_out = geometry.split()
    return tuple(map(int, grid_in.split("x"))), tuple(map(int, grid_out.split("x")))


def _build(geometry: str) -> tuple[Table, Table]:
    grid_in, grid_out = adaptive_grids(geometry)
    (index_h, weight_h), (index_w, weight_w) = map(_adaptive_axis, grid_in, grid_out)
    index = index_h[:, None, :, None] * grid_in[1] + index_w[None, :, None, :]
    weight = weight_h[:, None, :, None] * weight_w[None, :, None, :]
    n_out = math.prod(grid_out)
    index, weight = index.reshape(n_out, -1), weight.reshape(n_out, -1)
    return _table(index, weight, geometry), _transposed(index, weight, math.prod(grid_in))


def _adaptive_axis(n_in: int, n_out: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of one axis: index and weight [n_out, T]; the padding repeats the last input."""
    o = torch.arange(n_out)[:, None]
    start, end = o * n_in // n_out, -(-(o + 1) * n_in // n_out)
    index = start + torch.arange(int((end - start).max()))
    inside = index < end
    return index.minimum(end - 1), inside.double() / (end - start)


def _table(index: torch.Tensor, weight: torch.Tensor, geometry: str = "") -> Table:
    ragged = bool((weight == 0).any())
    return Table(index.int().contiguous(), weight.contiguous(), ragged, geometry)


def _transposed(index: torch.Tensor, weight: torch.Tensor, n_in: int) -> Table:
    """The transpose of a table: for every input token its outputs, in ascending order."""
    output, slot = torch.nonzero(weight, as_tuple=True)
    token, weight = index[output, slot], weight[output, slot]
    order = torch.sort(token, stable=True).indices
    token, output, weight = token[order], output[order], weight[order]
    count = torch.bincount(token, minlength=n_in)
    first = count.cumsum(0) - count
    slot = torch.arange(len(token)) - first[token]
    width = max(int(count.max()), 1)
    # Padding points at the token's own first output, so that no foreign value can leak in.
    own = output[first.clamp(max=len(output) - 1)]
    columns, weights = own[:, None].repeat(1, width), torch.zeros(n_in, width, dtype=torch.double)
    columns[token, slot], weights[token, slot] = output, weight
    return _table(columns, weights)
