"""``P = S act(X)`` by gathering: the stand-alone pool, and its backward by the transposed table."""

import torch
import triton
import triton.language as tl

from .activations import act, act_slope
from .launch import Config, launch

UNROLLED = (1, 4, 9)  # windows of 1 x 1, 2 x 2 and 3 x 3 tokens
# Tokens of any other window that are on their way at once; by what compiles without a spill.
STEP = tl.constexpr(4)
SLOPE_STEP = tl.constexpr(3)  # with the slope: of 4 sm_100 spills, of 2 Triton 3.5 does


def compiled_window(index: torch.Tensor, ragged: bool) -> int | None:
    """The window of a table [MO, T] that a kernel is compiled for; None: for any T, padded or not.

    Images bring windows of all sizes, and each would compile another kernel while a model runs. So
    only those that most models have are unrolled as a whole: those of a grid that is 1, 2 or 3
    times the one that it is pooled to, and of its backward, where a token is in one window. With
    the kernel for all others that makes four, however many grids there are.
    """
    window = index.shape[1]
    return window if window in UNROLLED and not ragged else None


def aligned(*strides: int) -> bool:
    """Whether blocks of 16 elements stay whole: then, and only then, accesses are 16 bytes wide.

    The kernels are told this much of strides that a grid decides. Triton would tell it apart by
    itself, but for each of them: strides of tokens that 16 does not divide make no access wide, and
    that of an image would still compile two kernels.
    """
    return all(stride % 16 == 0 for stride in strides)


@triton.jit
def gather_one(x, i, s, mask, stride_xn, ACT: tl.constexpr):
    """A token of every window, of index ``i`` [PM], activated, times its weight ``s`` [PM]."""
    v = tl.load(x + (i.to(tl.int64) * stride_xn)[:, None], mask=mask, other=0.0).to(tl.float32)
    if ACT is not None:
        v = act(v, ACT, EXACT=x.dtype.element_ty == tl.float32)
    return s[:, None] * v


@triton.jit
def images(b, stride, ALIGNED: tl.constexpr):
    """Offsets of the images ``b`` [PM]."""
    offsets = b.to(tl.int64) * stride
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 16)
    return offsets


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
    T,
    stride_xb,
    stride_xn,
    stride_xk,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACT: tl.constexpr,
    STEP: tl.constexpr = STEP,
):
    """The float32 block [PM, PK] of the pooled tokens; zero outside."""
    b, o = rm // MO, rm % MO
    mask = (rm < M)[:, None] & (rk < K)[None, :]
    x += images(b, stride_xb, ALIGNED)[:, None] + rk.to(tl.int64)[None, :] * stride_xk
    acc = tl.zeros([rm.shape[0], rk.shape[0]], dtype=tl.float32)
    if WINDOW is not None:
        index += o * WINDOW
        weight += o * WINDOW
        for t in tl.static_range(WINDOW):
            i, s = tl.load(index + t), tl.load(weight + t)
            acc += gather_one(x, i, s, mask, stride_xn, ACT)
    else:
        index += o * T
        weight += o * T
        for first in tl.range(0, T, STEP, num_stages=1):
            for t in tl.static_range(STEP):
                # A block: the interpreter of Triton 3.9 makes none of a scalar mask.
                inside = tl.full([rm.shape[0]], first + t, tl.int32) < T
                i = tl.load(index + first + t, mask=inside, other=0)
                s = tl.load(weight + first + t, mask=inside, other=0.0)
                # Padding has weight 0, and its token may hold an infinity.
                acc += gather_one(x, i, s, mask & (s != 0)[:, None], stride_xn, ACT)
    return acc


@triton.jit(do_not_specialize=["M", "MO", "T", "stride_xb", "stride_zb"])
def pool_kernel(
    x,
    index,
    weight,
    p,  # [B * MO, K]
    z,  # [B, MO, K] strided, or None
    M,
    MO,
    K,
    T,
    stride_xb,
    stride_xn,
    stride_xk,
    stride_zb,
    stride_zn,
    stride_zk,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACT: tl.constexpr,
    SLOPE: tl.constexpr,
    PM: tl.constexpr,
    PK: tl.constexpr,
):
    rm = tl.program_id(0) * PM + tl.arange(0, PM)
    rk = tl.program_id(1) * PK + tl.arange(0, PK)
    mask = (rm < M)[:, None] & (rk < K)[None, :]
    acc = gather(
        x, index, weight, rm, rk,
        M, MO, K, T, stride_xb, stride_xn, stride_xk, WINDOW, ALIGNED, ACT,
        STEP if SLOPE is None else SLOPE_STEP,
    )  # fmt: skip
    if SLOPE is not None:
        rows = images(rm // MO, stride_zb, ALIGNED) + (rm % MO).to(tl.int64) * stride_zn
        z += rows[:, None] + rk.to(tl.int64)[None, :] * stride_zk
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
    batch, tokens, channels = p.shape
    m = batch * tokens
    xb, xn, xk = x.stride()
    zb, zn, zk = (0, 0, 0) if z is None else z.stride()
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
        T=index.shape[1],
        stride_xb=xb,
        stride_xn=xn,
        stride_xk=xk,
        stride_zb=zb,
        stride_zn=zn,
        stride_zk=zk,
        WINDOW=compiled_window(index, ragged),
        ALIGNED=aligned(xb, xn, zb, zn),
        ACT=act if z is None else None,
        SLOPE=None if z is None else act,
    )
