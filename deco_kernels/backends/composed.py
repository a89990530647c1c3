"""The verbs one kernel after another: our pool, cuBLAS, and one elementwise kernel of ours."""

from types import ModuleType

import torch

from ..stencil import Table
from . import cuda, eager, triton


def _kernels(device: torch.device) -> ModuleType:
    # By float16, which both have wherever they run, so that one backward is computed by one.
    return cuda if triton.unusable(device, torch.float16) else triton


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernels can run on ``device`` with ``dtype``; None if some can."""
    without = triton.unusable(device, dtype)
    if without and _kernels(device) is cuda:
        other = cuda.unusable(device, dtype)
        return other and (
            other if other == without else f"not triton: {without}; not cuda: {other}"
        )
    return without


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; sums in float32."""
    return _kernels(x.device).pool(x, table, dtype, act)


def dact_pool(dp: torch.Tensor, table: Table, z: torch.Tensor, act: str) -> torch.Tensor:
    """``dz`` = (Sᵀ dp) * act'(z), by the transposed table: [B, rows, K] of z's dtype."""
    return _kernels(z.device).dact_pool(dp, table, z, act)


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
    return eager.linear(pool(x, table, w.dtype, act), w, bias, activation, keep_z)


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``dz`` = (dy w) * gelu'(z), ``g`` = gelu(z) and ``db`` = the sum of dz over its rows."""
    return _kernels(z.device).composed_dact_linear(dy, w, z, want_g, want_db)
