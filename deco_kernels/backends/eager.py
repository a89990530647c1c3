"""The verbs in torch's own operators: any device, any floating dtype, the same saved tensors."""

from functools import partial

import torch
import torch.nn.functional as F

from ..stencil import Table, adaptive_grids


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; by torch's own pooling where it has one."""
    if act is not None:
        x = _ACTIVATIONS[act][0](x)
    if x.shape[0] == 0:
        return x.new_empty(0, len(table.index), x.shape[2], dtype=dtype)
    if table.geometry:
        return _adaptive(x, table.geometry).to(dtype)
    return _gather(x, table).to(dtype)


def _adaptive(x: torch.Tensor, geometry: str) -> torch.Tensor:
    (batch, _, channels), (grid_in, grid_out) = x.shape, adaptive_grids(geometry)
    grid = x.view(batch, *grid_in, channels).permute(0, 3, 1, 2)
    p = F.adaptive_avg_pool2d(grid, grid_out).permute(0, 2, 3, 1)
    return p.reshape(batch, -1, channels).contiguous()


def _gather(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Sums in the weights' dtype."""
    (batch, tokens, channels), (rows, window) = x.shape, table.index.shape
    first = torch.arange(0, batch * tokens, tokens, device=x.device)
    bags = (table.index + first[:, None, None]).view(-1, window)
    weights = table.weight.repeat(batch, 1)
    flat = x.reshape(-1, channels).to(table.weight.dtype)
    p = F.embedding_bag(bags, flat, mode="sum", per_sample_weights=weights)
    return p.view(batch, rows, channels)


def dact_pool(dp: torch.Tensor, table: Table, z: torch.Tensor, act: str) -> torch.Tensor:
    """``dz`` = (Sᵀ dp) * act'(z), by the transposed table: [B, rows, K] of z's dtype."""
    return _ACTIVATIONS[act][1](pool(dp, table, z.dtype, None), z)


def _quick_gelu_backward(dy: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(1.702 * z)
    return dy * (s * (1 + 1.702 * z * (1 - s)))


# Each with its backward, of (dy, z).
_ACTIVATIONS = {
    "gelu": (F.gelu, torch.ops.aten.gelu_backward),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    ),
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "quick_gelu": (lambda z: z * torch.sigmoid(1.702 * z), _quick_gelu_backward),
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
    z = F.linear(p, w, bias)
    g = None if activation is None else F.gelu(z)
    return p, z if keep_z else None, g


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``dz`` = (dy w) * gelu'(z), ``g`` = gelu(z) and ``db`` = the sum of dz over its rows."""
    dz = torch.ops.aten.gelu_backward(dy @ w, z)
    return dz, F.gelu(z) if want_g else None, dz.sum(0) if want_db else None
