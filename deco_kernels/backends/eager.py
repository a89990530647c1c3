"""The verbs in torch's own operators: any device, any floating dtype, the same saved tensors."""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..stencil import Places, Table, plain_mode
from ..stencil.geometry import Geometry


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; by torch's own pooling where it has one."""
    if act is not None:
        x = _ACTIVATIONS[act][0](x)
    batch, _, channels = x.shape
    if not (batch and channels):
        return x.new_empty(batch, len(table.index), channels, dtype=dtype)
    own = table.geometry and _known_operator(table.geometry)
    p = _by_own(own, x) if own and own.exact else _gather(x, table)
    return (p if p.dtype is dtype else p.to(dtype)).contiguous()


class _Operator(NamedTuple):
    """Torch's own operator for a geometry.

    ``exact`` where it is fast, sums 16 bits in float32, and reads no token of weight 0. Those of
    three axes are not the first two, interpolation is not the last, which a NaN shows.
    """

    grid_in: tuple[int, ...]
    pool: Callable[[torch.Tensor], torch.Tensor] | None
    exact: bool


def _by_own(operator: _Operator, x: torch.Tensor) -> torch.Tensor:
    """[B, n_in, K] -> [B, n_out, K]"""
    if operator.pool is None:
        return x.clone()  # what is returned may be changed in place
    grid = x.transpose(1, 2).view(x.shape[0], x.shape[2], *operator.grid_in)
    return operator.pool(grid).flatten(2).transpose(1, 2)


def _operator(geometry: Geometry) -> _Operator:
    kind, *words = geometry.kind.split(" ")
    grid_in, grid_out, *window = geometry.parts()
    flat = len(grid_in) < 3
    if kind == "identity":
        return _Operator(grid_in, None, False)
    if len(grid_in) == 1:  # as a row: faster
        grid_in, grid_out = (1, *grid_in), (1, *grid_out)
        window = [(n, *size) for n, size in zip((1, 1, 0)[: len(window)], window, strict=True)]
    if kind == "adaptive":
        own = F.adaptive_avg_pool2d if flat else F.adaptive_avg_pool3d
        return _Operator(grid_in, partial(own, output_size=grid_out), flat)
    if kind == "bilinear":
        how = {"mode": "bilinear" if flat else "trilinear", "align_corners": words == ["corners"]}
        return _Operator(grid_in, partial(F.interpolate, size=grid_out, **how), False)
    names = "kernel_size", "stride", "padding"
    how = {"ceil_mode": words[0] == "ceil", "count_include_pad": words[1] == "include"}
    own = F.avg_pool2d if flat else F.avg_pool3d
    return _Operator(grid_in, partial(own, **dict(zip(names, window, strict=True)), **how), flat)


_known_operator = lru_cache(maxsize=4096)(_operator)


# By a table's weight: its index may serve two dtypes.
_bags: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _bags_of(table: Table) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A table without its padding: tokens, their weights, and where each row's begin."""
    found = _bags.get(table.weight)
    if found is None:
        with plain_mode():
            real = table.weight != 0
            ends = real.sum(1, dtype=torch.int32).cumsum(0, dtype=torch.int32)
            first = F.pad(ends[:-1], (1, 0))
            found = _bags[table.weight] = table.index[real], table.weight[real], first
    return found


def _gather(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Sums in the weights' dtype. Padding is not read: 0 * inf would be a NaN."""
    batch, tokens, channels = x.shape
    index, weight, first = _bags_of(table)
    if batch > 1:
        images = torch.arange(batch, dtype=torch.int32, device=x.device)[:, None]
        first = (first + images * len(index)).flatten()
        index = (index + images * tokens).flatten()
        weight = weight.repeat(batch)
    flat = x.reshape(-1, channels).to(weight.dtype)
    p = F.embedding_bag(index, flat, first, mode="sum", per_sample_weights=weight)
    return p.view(batch, -1, channels)


def traceable_pool(
    x: torch.Tensor, places: Places, dtype: torch.dtype, act: str | None = None
) -> torch.Tensor:
    """:func:`pool` in operators that torch differentiates and traces, with sizes that may vary."""
    if act is not None:
        x = _ACTIVATIONS[act][0](x)
    wide = x if x.dtype.itemsize > 2 else x.float()
    if not places.kind:
        weight = places.weight[..., None].to(wide.dtype)
        p = torch.where(weight != 0, wide[:, places.index], 0).mul(weight).sum(2)
    else:
        own = _operator(Geometry(places.kind, tuple(places.sizes)))
        p = _by_own(own, x if own.exact else wide)
    return p.to(dtype)


def dact_pool(dp: torch.Tensor, table: Table, z: torch.Tensor, act: str) -> torch.Tensor:
    """``dz`` = (Sᵀ dp) * act'(z), by the transposed table: [B, rows, K] of z's dtype."""
    return _ACTIVATIONS[act][1](pool(dp, table, z.dtype, None), z)


def _quick_gelu(z: torch.Tensor) -> torch.Tensor:
    return z * torch.sigmoid(1.702 * z)


def _quick_gelu_backward(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    wide = z if z.dtype.itemsize > 2 else z.float()
    s = torch.sigmoid(1.702 * wide)
    return (dy * (s + 1.702 * (wide * (s * (1 - s))))).to(z.dtype)  # in this order no inf * 0


# Each with its backward, of (dy, z).
_ACTIVATIONS = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "quick_gelu": (_quick_gelu, _quick_gelu_backward),
}


def pool_linear(
    x: torch.Tensor,
    table: Table,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    keep_z: bool,
    act: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``p`` = S act(x), ``z`` = p wᵀ + bias and ``g`` = gelu(z)."""
    return linear(pool(x, table, w.dtype, act), w, bias, activation, keep_z)


def linear(
    p: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """What follows the pool in :func:`pool_linear`."""
    z = product(p, w, bias)
    g = None if activation is None else F.gelu(z)
    return p, z if keep_z else None, g


def product(x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """``F.linear`` of x [B, M, K]; no view, as a Function's could not be changed in place."""
    return F.linear(x, w, bias).data


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``dz`` = (dy w) * gelu'(z), ``g`` = gelu(z) and ``db`` = the sum of dz over its rows."""
    dz = torch.ops.aten.gelu_backward(dy @ w, z)
    return dz, F.gelu(z) if want_g else None, dz.sum(0) if want_db else None
