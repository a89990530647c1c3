"""``P = S act(X)`` by gathering: the stand-alone pool, and its backward by the transposed table."""

import torch
import triton
import triton.language as tl

from .activations import act, act_slope
from .launch import Config, launch


@triton.jit
def gather_one(x, index, weight, t, mask, stride_xn, RAGGED: tl.constexpr, ACT: tl.constexpr):
    """The t-th token of every window, activated, times its weight."""
    i, s = tl.load(index + t)[:, None], tl.load(weight + t)[:, None]
    if RAGGED:
        mask = mask & (s != 0)
    v = tl.load(x + i.to(tl.int64) * stride_xn, mask=mask, other=0.0).to(tl.float32)
    if ACT is not None:
        v = act(v, ACT, EXACT=x.dtype.element_ty == tl.float32)
    return s * v


@triton.jit
def gather(
    x,  # [B, n_in, K] strided
    index,  # [MO, T]
    weight,  # [MO, T]
    rm,  # [PM] rows of the flattened output [B * MO]
    rk,  # [PK] channels
    M,
    MO,
    K,
    stride_xb,
    stride_xn,
    stride_xk,
    T: tl.constexpr,
    RAGGED: tl.constexpr,
    ACT: tl.constexpr,
):
    """The float32 block [PM, PK] of the pooled tokens; zero outside."""
    b, o = rm // MO, rm % MO
    mask = (rm < M)[:, None] & (rk < K)[None, :]
    x += b.to(tl.int64)[:, None] * stride_xb + rk.to(tl.int64)[None, :] * stride_xk
    index += o * T
    weight += o * T
    acc = tl.zeros([rm.shape[0], rk.shape[0]], dtype=tl.float32)
    # T is fixed by the geometry: unrolled, so that the loads of a whole window are in flight.
    if T <= 16:
        for t in tl.static_range(T):
            acc += gather_one(x, index, weight, t, mask, stride_xn, RAGGED, ACT)
    else:
        for t in tl.range(T, num_stages=1, loop_unroll_factor=8):
            acc += gather_one(x, index, weight, t, mask, stride_xn, RAGGED, ACT)
    return acc


@triton.jit(do_not_specialize=["M", "MO"])
def pool_kernel(
    x,
    index,
    weight,
    p,  # [B * MO, K]
    z,  # [B, MO, K] strided, or None
    M,
    MO,
    K,
    stride_xb,
    stride_xn,
    stride_xk,
    stride_zb,
    stride_zn,
    stride_zk,
    T: tl.constexpr,
    RAGGED: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    PM: tl.constexpr,
    PK: tl.constexpr,
):
    rm = tl.program_id(0) * PM + tl.arange(0, PM)
    rk = tl.program_id(1) * PK + tl.arange(0, PK)
    mask = (rm < M)[:, None] & (rk < K)[None, :]
    acc = gather(
        x, index, weight, rm, rk, M, MO, K, stride_xb, stride_xn, stride_xk, T, RAGGED, ACT
    )
    if SLOPE is not None:
        b, o = (rm // MO).to(tl.int64), (rm % MO).to(tl.int64)
        z += (b * stride_zb + o * stride_zn)[:, None] + rk.to(tl.int64)[None, :] * stride_zk
        v = tl.load(z, mask=mask, other=0.0).to(tl.float32)
        acc *= act_slope(v, SLOPE, EXACT=z.dtype.element_ty == tl.float32)
    p += rm.to(tl.int64)[:, None] * K + rk[None, :]
    tl.store(p, acc.to(p.dtype.element_ty), mask=mask)


def pool(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    ragged: bool,
    p: torch.Tensor,
    config: Config,
    act: str | None = None,
    z: torch.Tensor | None = None,
) -> None:
    """Fill ``p`` [B, MO, K] from ``x`` [B, n_in, K] and a table [MO, T].

    ``act`` is that of the tokens x; with ``z`` [B, MO, K] its derivative there, times which the
    sums are.
    """
    (_, tokens, channels), window = p.shape, index.shape[1]
    m = p.shape[0] * tokens
    launch(
        pool_kernel,
        (triton.cdiv(m, config.tiles["PM"]), triton.cdiv(channels, config.tiles["PK"])),
        config,
        x=x,
        index=index,
        weight=weight,
        p=p,
        z=z,
        M=m,
        MO=tokens,
        K=channels,
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_xk=x.stride(2),
        stride_zb=0 if z is None else z.stride(0),
        stride_zn=0 if z is None else z.stride(1),
        stride_zk=0 if z is None else z.stride(2),
        T=window,
        RAGGED=ragged,
        ACT=act if z is None else None,
        SLOPE=None if z is None else act,
    )
