"""``dZ = (dY W) * gelu'(Z)`` in one launch; emits ``G = gelu(Z)`` and sums of dZ over its tiles."""

import torch
import triton
import triton.language as tl

from .activations import gelu_and_slope
from .launch import Config, launch
from .tile import halves


@triton.jit
def epilogue(acc, z, dz, g, sums, panel, rm, first, M, N, PIECE: tl.constexpr):
    """Turn the gradient ``acc`` of the activation into that of the pre-activation, and store.

    Its columns begin at ``first``.
    """
    BN: tl.constexpr = acc.shape[1]
    if acc.numel > PIECE:
        left, right = halves(acc)
        epilogue(left, z, dz, g, sums, panel, rm, first, M, N, PIECE)
        epilogue(right, z, dz, g, sums, panel, rm, first + BN // 2, M, N, PIECE)
    else:
        rn = first + tl.arange(0, BN)
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        out = rm.to(tl.int64)[:, None] * N + rn[None, :]
        zs = tl.load(z + out, mask=inside, other=0.0).to(tl.float32)
        y, slope = gelu_and_slope(zs, EXACT=z.dtype.element_ty == tl.float32)
        if g is not None:
            tl.store(g + out, y.to(g.dtype.element_ty), mask=inside)
        acc *= slope
        tl.store(dz + out, acc.to(dz.dtype.element_ty), mask=inside)
        if sums is not None:  # rows past the end are zero in acc
            tl.store(sums + panel.to(tl.int64) * N + rn, tl.sum(acc, axis=0), mask=rn < N)


@triton.jit(do_not_specialize=["M"])
def dact_linear_kernel(
    dy,  # [M, K] strided
    w,  # [K, N] strided
    z,  # [M, N]
    dz,  # [M, N]
    g,  # [M, N] or None
    sums,  # [cdiv(M, BM), N] float32 or None
    M,
    N,
    K,
    stride_dym,
    stride_dyk,
    stride_wk,
    stride_wn,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    # GROUP panels of rows share a sweep over the columns, so that their tiles meet in L2.
    panels, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    height = tl.minimum(panels - first, GROUP)
    place = tl.program_id(0) % (GROUP * columns)
    panel, column = first + place % height, place // height

    rm, rn, rk = panel * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    dy += rm.to(tl.int64)[:, None] * stride_dym + rk.to(tl.int64)[None, :] * stride_dyk
    w += rk.to(tl.int64)[:, None] * stride_wk + rn.to(tl.int64)[None, :] * stride_wn
    step = tl.full([], BK, tl.int64)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(dy, mask=(rm < M)[:, None] & (rk < K - k)[None, :], other=0.0)
        b = tl.load(w, mask=(rk < K - k)[:, None] & (rn < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        dy += step * stride_dyk
        w += step * stride_wk
    # In halves or more: z, gelu, slope and dz of a whole tile do not fit into the registers.
    PIECE: tl.constexpr = 128 * 64 if BM * BN > 128 * 64 else BM * BN // 2
    epilogue(acc, z, dz, g, sums, panel, rm, column * BN, M, N, PIECE)


@triton.jit(do_not_specialize=["panels"])
def bias_grad_kernel(
    sums,  # [panels, N] float32
    db,  # [N]
    panels,
    N,
    RN: tl.constexpr,
):
    rn = tl.program_id(0) * RN + tl.arange(0, RN)
    acc = tl.zeros([RN], dtype=tl.float32)
    sums += rn
    for _ in tl.range(0, panels, num_stages=1, loop_unroll_factor=4):
        acc += tl.load(sums, mask=rn < N, other=0.0)
        sums += N
    tl.store(db + rn, acc.to(db.dtype.element_ty), mask=rn < N)


def dact_linear(
    dy: torch.Tensor,
    w: torch.Tensor,
    z: torch.Tensor,
    dz: torch.Tensor,
    g: torch.Tensor | None,
    sums: torch.Tensor | None,
    precision: str,
    config: Config,
) -> None:
    """Fill ``dz`` [M, N] from ``dy`` [M, K], ``w`` [K, N], ``z`` [M, N]; ``g``, ``sums`` if given.

    ``sums`` [cdiv(M, BM), N] float32 receives the sums of dz over each panel of rows.
    """
    (m, features), tiles = z.shape, config.tiles
    launch(
        dact_linear_kernel,
        (triton.cdiv(m, tiles["BM"]) * triton.cdiv(features, tiles["BN"]),),
        config,
        dy=dy,
        w=w,
        z=z,
        dz=dz,
        g=g,
        sums=sums,
        M=m,
        N=features,
        K=dy.shape[1],
        stride_dym=dy.stride(0),
        stride_dyk=dy.stride(1),
        stride_wk=w.stride(0),
        stride_wn=w.stride(1),
        PRECISION=precision,
    )


def bias_grad(sums: torch.Tensor, db: torch.Tensor, config: Config) -> None:
    """Fill ``db`` [N] with the sum of ``sums`` [panels, N] over the panels, in their order."""
    panels, features = sums.shape
    launch(
        bias_grad_kernel,
        (triton.cdiv(features, config.tiles["RN"]),),
        config,
        sums=sums,
        db=db,
        panels=panels,
        N=features,
    )
