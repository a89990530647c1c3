"""The verbs in torch's own operators: any device, any floating dtype, the same saved tensors."""

from functools import partial

import torch
import torch.nn.functional as F

from ..stencil import Table
from ..stencil.geometry import options as parse


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    return None


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; by torch's own pooling where it has one."""
    if act is not None:
        x = _ACTIVATIONS[act][0](x)
    if x.shape[0] == 0:
        return x.new_empty(0, len(table.index), x.shape[2], dtype=dtype)
    p = _own(x, table.geometry) if table.geometry else None
    return (_gather(x, table) if p is None else p).to(dtype)


def _own(x: torch.Tensor, geometry: str) -> torch.Tensor | None:
    """By torch's own operator, where it has one that is fast and sums 16-bit tokens in float32.

    Those of three axes are not so, nor interpolation along one, which is done as that of a row.
    """
    kind, grid_in, grid_out, options = parse(geometry)
    if kind == "identity" or len(grid_in) == 3:
        return None
    if len(grid_in) == 1:
        grid_in, grid_out = (1, *grid_in), (1, *grid_out)
    batch, _, channels = x.shape
    grid = x.view(batch, *grid_in, channels).permute(0, 3, 1, 2)
    if kind == "adaptive":
        p = F.adaptive_avg_pool2d(grid, grid_out)
    elif kind == "bilinear":
        p = F.interpolate(grid, size=grid_out, mode=kind, align_corners=options[0])
    else:
        kernel, stride, padding, ceil_mode, count_include_pad = options
        if len(kernel) == 1:
            kernel, stride, padding = (1, *kernel), (1, *stride), (0, *padding)
        p = F.avg_pool2d(grid, kernel, stride, padding, ceil_mode, count_include_pad)
    return p.permute(0, 2, 3, 1).reshape(batch, -1, channels).contiguous()


def _gather(x: torch.Tensor, table: Table) -> torch.Tensor:
    """Sums in the weights' dtype."""
    (batch, tokens, channels), (rows, window) = x.shape, table.index.shape
    bags, weights = table.index, table.weight
    if batch > 1:
        first = torch.arange(0, batch * tokens, tokens, device=x.device)
        bags = (bags + first[:, None, None]).view(-1, window)
        weights = weights.repeat(batch, 1)
    flat = x.reshape(-1, channels).to(table.weight.dtype)
    p = F.embedding_bag(bags, flat, mode="sum", per_sample_weights=weights)
    p = p.view(batch, rows, channels)
    return _clear(p, table.weight) if table.ragged else p


def _clear(p: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Zero where no token has a weight: the padding there may have read a NaN."""
    empty = weight[:, 0] == 0
    known = p.device.type == "cpu" and type(p) is torch.Tensor and not torch.compiler.is_compiling()
    if known and not empty.any():  # spares a pass over p
        return p
    return p.masked_fill_(empty[:, None], 0)


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
