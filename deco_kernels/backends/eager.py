"""The verbs in torch's own operators: any device, any floating dtype, the same saved tensors."""

import torch
import torch.nn.functional as F

from ..stencil import Table


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype) -> torch.Tensor:
    """[B, n_in, K] -> [B, rows, K] of ``dtype``; sums in the weights' dtype."""
    (batch, tokens, channels), (rows, window) = x.shape, table.index.shape
    if batch == 0:
        return x.new_empty(0, rows, channels, dtype=dtype)
    index, weight, _ = table
    if batch > 1:
        first = torch.arange(0, batch * tokens, tokens, device=x.device)
        index, weight = index + first[:, None, None], weight.repeat(batch, 1)
    flat = x.reshape(-1, channels).to(weight.dtype)
    bags = index.view(-1, window)
    p = F.embedding_bag(bags, flat, mode="sum", per_sample_weights=weight)
    return p.to(dtype).view(batch, rows, channels)


def pool_linear(
    x: torch.Tensor,
    table: Table,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    keep_z: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``p`` = S x, ``z`` = p wᵀ + bias and ``g`` = gelu(z)."""
    return linear(pool(x, table, w.dtype), w, bias, activation, keep_z)


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
