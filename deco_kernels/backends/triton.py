"""The verbs in Triton: allocates the outputs, picks the configuration, launches."""

import importlib
from functools import cache
from types import ModuleType

import torch

from ..host import requirements
from ..kernels.launch import Config, chip_of, standing_in
from ..stencil import Table
from ..tuning import config_for
from . import eager


@cache
def _kernels() -> dict[str, ModuleType] | str:
    """The kernels' modules, or why they cannot be imported.

    Triton takes a second to import: that waits until somebody needs it.
    """
    names = "pool", "pool_linear", "dact_linear", "dgelu"
    try:
        return {name: importlib.import_module(f"..kernels.{name}", __package__) for name in names}
    except ImportError as error:
        return str(error)


def unusable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot run on ``device`` with ``dtype``; None if they can."""
    kernels = _kernels()
    if isinstance(kernels, str):
        return f"triton cannot be imported ({kernels})"
    if dtype == torch.float64:
        return "float64 is left to torch"
    if standing_in():
        return None
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "AMD GPUs are not supported"
        arch = chip_of(device).arch
        if arch < 80:
            return f"compute capability {arch / 10} is below 8.0"
        return requirements.triton_lacks()
    if device.type == "cpu" and _interpreted():
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    return f"it needs a CUDA device, the tokens are on {device.type}"


def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret


def unfenced(arch: int) -> str | None:
    """Why this Triton must not multiply matrices on ``arch``; None if it may.

    wgmma and tcgen05 read shared memory in another way than cp.async writes it, and want a fence
    between them. Triton has it since 3.7; before, a tile may be multiplied before it is there.
    """
    if isinstance(_kernels(), str) or not 90 <= arch < 120:
        return None
    import triton

    major, minor, *_ = triton.__version__.split(".")
    if (int(major), int(minor)) >= (3, 7):
        return None
    return (
        f"Triton {triton.__version__} puts no fence between loads and products for compute"
        f" capability {arch / 10}, 3.7 and later do"
    )


def no_products(device: torch.device) -> str | None:
    """Why products are cuBLAS's on ``device``, of whatever dtype; None if they may run here."""
    return unfenced(chip_of(device).arch)


def fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matrix products run in these kernels; float32 by IEEE rules is cuBLAS's."""
    if no_products(device):
        return False
    return dtype.itemsize == 2 or torch.backends.cuda.matmul.fp32_precision == "tf32"


def _config(kernel: str, t: torch.Tensor) -> Config:
    return config_for(kernel, t.dtype, chip_of(t.device).arch)


def pool(x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None = None) -> torch.Tensor:
    """act(x) [B, n_in, K] -> [B, rows, K] of ``dtype``; sums in float32."""
    p = x.new_empty(x.shape[0], table.index.shape[0], x.shape[2], dtype=dtype)
    if p.numel():
        _kernels()["pool"].pool(x, *table[:3], p, _config("pool", x), act)
    return p


def dact_pool(dp: torch.Tensor, table: Table, z: torch.Tensor, act: str) -> torch.Tensor:
    """``dz`` = (Sᵀ dp) * act'(z), by the transposed table: [B, rows, K] of z's dtype."""
    dz = z.new_empty(z.shape)
    if dz.numel():
        _kernels()["pool"].pool(dp, *table[:3], dz, _config("pool", z), act, z)
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
    if not fuses(w.device, w.dtype):
        return eager.linear(pool(x, table, w.dtype, act), w, bias, activation, keep_z)
    shape = x.shape[0], table.index.shape[0]
    p = w.new_empty(*shape, w.shape[1])
    z = w.new_empty(*shape, w.shape[0]) if keep_z else None
    g = None if activation is None else w.new_empty(*shape, w.shape[0])
    if p.numel():
        config = _config("pool_linear", w)
        _kernels()["pool_linear"].pool_linear(x, *table[:3], w, bias, p, z, g, "tf32", config, act)
    return p, z, g


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """``dz`` = (dy w) * gelu'(z), ``g`` = gelu(z) and ``db`` = the sum of dz over its rows."""
    if not fuses(z.device, z.dtype):
        return composed_dact_linear(dy, w, z, want_g, want_db)
    config, dz = _config("dact_linear", z), torch.empty_like(z)
    g, sums = _extras(z, want_g, want_db, config)
    if len(z):
        _kernels()["dact_linear"].dact_linear(dy, w, z, dz, g, sums, "tf32", config)
    return dz, g, _bias_grad(sums, z)


def composed_dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """:func:`dact_linear` with cuBLAS's product, then one elementwise kernel."""
    config = _config("dgelu", z)
    dz = torch.mm(dy, w, out=torch.empty_like(z))  # also where autocast would have another dtype
    g, sums = _extras(z, want_g, want_db, config)
    if len(z):
        _kernels()["dgelu"].dgelu(dz, z, g, sums, config)
    return dz, g, _bias_grad(sums, z)


def _extras(
    z: torch.Tensor, want_g: bool, want_db: bool, config: Config
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Room for G [M, N], and for the sums of dZ over panels of rows, as wanted."""
    panels = -(-len(z) // config.tiles["BM"])
    sums = z.new_empty(panels, z.shape[1], dtype=torch.float32) if want_db else None
    return torch.empty_like(z) if want_g else None, sums


def _bias_grad(sums: torch.Tensor | None, z: torch.Tensor) -> torch.Tensor | None:
    if sums is None:
        return None
    db = z.new_empty(z.shape[1])
    _kernels()["dact_linear"].bias_grad(sums, db, _config("bias_grad", z))
    return db
