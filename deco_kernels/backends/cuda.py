"""The verbs in CUDA C++: allocates the outputs, calls the library; large products are cuBLAS's."""

import torch

from ..host import library
from ..kernels.launch import chip_of
from ..kernels.workspace import workspace_for
from ..stencil import Table
from . import eager


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on ``device`` with ``dtype``; None if they can."""
    if dtype == torch.float64:
        return "float64 is left to torch"
    if not library.standing_in():
        if device.type != "cuda":
            return f"it needs a CUDA device, the tokens are on {device.type}"
        if torch.version.hip is not None:
            return "AMD GPUs are not supported"
    arch = chip_of(device).arch
    if arch < 75:
        return f"compute capability {arch / 10} is below 7.5"
    if arch < 80 and dtype == torch.bfloat16:
        return f"bfloat16 needs compute capability 8.0, this is {arch / 10}"
    return library.problem(arch)


def prepare(device: torch.device) -> None:
    """Load the library for ``device``, or build it.

    Raises:
        RuntimeError: it cannot be built.
    """
    library.operators(device)


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products run in these kernels; float32 by IEEE rules is cuBLAS's."""
    if dtype.itemsize == 2:
        return True
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return tf32 and chip_of(device).arch >= 80


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; sums in float32."""
    p = x.new_empty(x.shape[0], table.index.shape[0], x.shape[2], dtype=dtype)
    if p.numel():
        library.operators(x.device).pool(x, *table[:3], act, None, p)
    return p


def dact_pool(dp: torch.Tensor, table: Table, z: torch.Tensor, act: str) -> torch.Tensor:
    """``dz`` = (Sᵀ dp) * act'(z), by the transposed table: [B, rows, K] of z's dtype."""
    dz = z.new_empty(z.shape)
    if dz.numel():
        library.operators(z.device).pool(dp, *table[:3], act, z, dz)
    return dz


def pool_linear(
    x: torch.Tensor,
    table: Table,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    keep_z: bool,
    act: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``p`` = S act(x), ``z`` = p wᵀ + bias and ``g`` = gelu(z), in one launch."""
    if not fuses(x.device, w.dtype):
        return eager.linear(pool(x, table, w.dtype, act), w, bias, activation, keep_z)
    shape = x.shape[0], table.index.shape[0]
    p = w.new_empty(*shape, w.shape[1])
    z = w.new_empty(*shape, w.shape[0]) if keep_z else None
    g = None if activation is None else w.new_empty(*shape, w.shape[0])
    if p.numel():
        ops = library.operators(x.device)
        workspace = workspace_for(x.device, ops.workspace_size(shape[0] * shape[1]))
        sms = chip_of(x.device).sms
        ops.pool_linear(x, *table[:3], act, w, bias, p, z, g, workspace, sms)
    return p, z, g


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``dz`` = (dy w) * gelu'(z), ``g`` = gelu(z) and ``db`` = the sum of dz over its rows.

    The product is cuBLAS's.
    """
    dz = torch.mm(dy, w, out=torch.empty_like(z))  # also where autocast would have another dtype
    g = torch.empty_like(z) if want_g else None
    m, n = z.shape
    if not m:
        return dz, g, z.new_zeros(n) if want_db else None
    ops = library.operators(z.device)
    sums = z.new_empty(ops.sum_blocks(m), n, dtype=torch.float32) if want_db else None
    ops.dgelu(dz, z, g, sums)
    return dz, g, sums.sum(0).to(z.dtype) if want_db else None


composed_dact_linear = dact_linear
