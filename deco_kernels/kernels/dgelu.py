"""``dZ = dG * gelu'(Z)`` elementwise, in place; emits ``G = gelu(Z)`` and sums of dZ over tiles."""

import torch
import triton
import triton.language as tl

from .dact_linear import epilogue
from .launch import Config, launch


@triton.jit(do_not_specialize=["M"])
def dgelu_kernel(
    dz,  # [M, N], holds dG
    z,  # [M, N]
    g,  # [M, N] or None
    sums,  # [cdiv(M, BM), N] float32 or None
    M,
    N,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    panel, first = tl.program_id(0), tl.program_id(1) * BN
    rm, rn = panel * BM + tl.arange(0, BM), first + tl.arange(0, BN)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    dg = tl.load(dz + rm.to(tl.int64)[:, None] * N + rn[None, :], mask=inside, other=0.0)
    epilogue(dg.to(tl.float32), z, dz, g, sums, panel, rm, first, M, N, PIECE=BM * BN)


def dgelu(
    dz: torch.Tensor,
    z: torch.Tensor,
    g: torch.Tensor | None,
    sums: torch.Tensor | None,
    config: Config,
) -> None:
    """Turn ``dz`` [M, N], which holds dG, into dZ; fill ``g`` and ``sums`` if given.

    ``sums`` [cdiv(M, BM), N] float32 receives the sums of dz over each panel of rows.
    """
    (m, features), tiles = z.shape, config.tiles
    launch(
        dgelu_kernel,
        (triton.cdiv(m, tiles["BM"]), triton.cdiv(features, tiles["BN"])),
        config,
        dz=dz,
        z=z,
        g=g,
        sums=sums,
        M=m,
        N=features,
    )
