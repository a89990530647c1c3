"""How does an operator take a stencil? By its geometry or its tables, and where those are kept."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import NamedTuple

import torch

from ..host.private import no_modes
from ..host.streams import capturing
from . import geometry as grids
from .geometry import Geometry
from .kept import Kept
from .table import Pair, Table, bytes_of


class Places(NamedTuple):
    """A stencil as operators take it: one grid's by its geometry, any other's by its tables.

    So a compiled graph has neither constants of a geometry nor a size that must not change.
    """

    index: torch.Tensor | None
    weight: torch.Tensor | None
    column_index: torch.Tensor | None
    column_weight: torch.Tensor | None
    ragged: bool
    columns_ragged: bool
    kind: str  # of the geometry; "" if there are tables
    sizes: Sequence[int]

    def table(self, transposed: bool, device: torch.device, dtype: torch.dtype) -> Table:
        """The rows, or the columns, on ``device``, for tokens of ``dtype``."""
        if self.kind:
            kind = torch.float64 if dtype == torch.float64 else torch.float32
            return of_grid(Geometry(self.kind, tuple(self.sizes)), device, kind)[transposed]
        if transposed:
            return Table(self.column_index, self.column_weight, self.columns_ragged)
        return Table(self.index, self.weight, self.ragged)

    def n_out(self, transposed: bool) -> int:
        """How many tokens there are after pooling, or before."""
        if self.kind:
            return prod(Geometry(self.kind, tuple(self.sizes)).parts()[0 if transposed else 1])
        return (self.column_index if transposed else self.index).shape[0]


@contextmanager
def plain_mode() -> Iterator[None]:
    """What is kept must serve every caller, whatever mode this one is in."""
    with no_modes(), torch.inference_mode(False):
        yield


def of_grid(geometry: Geometry, device: torch.device, dtype: torch.dtype) -> Pair:
    """Rows and columns of one grid's matrix, made once for every device and dtype."""

    def make() -> Pair:
        with plain_mode():
            rows, columns = grids.tables(geometry, dtype)
            return rows.to(device, dtype), columns.to(device, dtype)

    key = geometry, device, dtype
    tables = _kept.get(key, make)
    if capturing(device):
        _in_graphs[key] = tables
    return tables


def _finish(tables: Pair) -> None:
    """Wait for what reads them, on whatever stream."""
    if tables[0].index.is_cuda:
        torch.cuda.synchronize(tables[0].index.device)


_kept = Kept(bytes_of, before_drop=_finish)
_in_graphs: dict[tuple, Pair] = {}  # a captured graph reads them for as long as it lives
