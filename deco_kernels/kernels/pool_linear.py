"""Pool and first linear layer in one launch: a persistent kernel whose tasks hand panels of P on.

CTAs draw task numbers from a ticket counter. A *pool task* gathers PM rows of ``P = S X``, writes
them (P is needed for the weight gradient anyway) and raises its panel's flag. A *gemm task* waits
for all pool tasks of its panel of BM rows and multiplies it with a tile of the weight. Tickets are
ordered: the pool tasks of the first ``lead`` panels, then for every panel the pool tasks of the
panel ``lead`` further on and its own gemm tasks. A task waits for lower tickets only, and those
are held by CTAs that run: it cannot deadlock, whatever the number of CTAs. The memory-bound pooling
of one panel overlaps with the compute-bound tiles of another.
"""

import torch
import triton
import triton.language as tl

from .activations import gelu
from .launch import Config, chip_of, launch
from .pool import aligned, compiled_window, gather
from .tile import halves
from .workspace import workspace_for

HEADER = tl.constexpr(2)  # of the workspace: ticket, CTAs that have finished; then the flags


@triton.jit
def pool_task(
    x,
    index,
    weight,
    p,
    row,
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
    PM: tl.constexpr,
    PK: tl.constexpr,
):
    rm = row + tl.arange(0, PM)
    for k in tl.range(0, K, PK, num_stages=1):
        rk = k + tl.arange(0, PK)
        acc = gather(
            x, index, weight, rm, rk,
            M, MO, K, T, stride_xb, stride_xn, stride_xk, WINDOW, ALIGNED, ACT,
        )  # fmt: skip
        out = p + rm.to(tl.int64)[:, None] * K + rk[None, :]
        tl.store(out, acc.to(p.dtype.element_ty), mask=(rm < M)[:, None] & (rk < K)[None, :])


@triton.jit
def epilogue(acc, bias, z, g, rm, first, M, N, PIECE: tl.constexpr):
    """Add the bias to ``acc``, whose columns begin at ``first``; store it and its GELU."""
    BN: tl.constexpr = acc.shape[1]
    if acc.numel > PIECE:
        left, right = halves(acc)
        epilogue(left, bias, z, g, rm, first, M, N, PIECE)
        epilogue(right, bias, z, g, rm, first + BN // 2, M, N, PIECE)
    else:
        rn = first + tl.arange(0, BN)
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        if bias is not None:
            acc += tl.load(bias + rn, mask=rn < N, other=0.0).to(tl.float32)[None, :]
        out = rm.to(tl.int64)[:, None] * N + rn[None, :]
        if z is not None:
            tl.store(z + out, acc.to(z.dtype.element_ty), mask=inside)
        if g is not None:
            y = gelu(acc, EXACT=g.dtype.element_ty == tl.float32)
            tl.store(g + out, y.to(g.dtype.element_ty), mask=inside)


@triton.jit
def gemm_task(
    p,
    w,
    bias,
    z,
    g,
    panel,
    column,
    M,
    N,
    K,
    stride_wn,
    stride_wk,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    rm, rn, rk = panel * BM + tl.arange(0, BM), column * BN + tl.arange(0, BN), tl.arange(0, BK)
    # Rows past the end are masked, not wrapped: panel 0's rows may not have been waited for.
    rows, columns = (rm < M)[:, None], (rn < N)[None, :]
    p += rm.to(tl.int64)[:, None] * K + rk[None, :]
    w += rn.to(tl.int64)[None, :] * stride_wn + rk.to(tl.int64)[:, None] * stride_wk
    stride = tl.cast(stride_wk, tl.int64)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(p + k, mask=rows & (rk < K - k)[None, :], other=0.0)
        b = tl.load(w + k * stride, mask=(rk < K - k)[:, None] & columns, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    # In pieces, as sums do not fit into the registers with bias, GELU and addresses: more than 128
    # x 128, and 64 x 128 by Triton 3.5, for which ptxas aims at 168 registers. Halves of just 128 x
    # 128 would make it aim at 128 of them on sm_100, and spill.
    HALF: tl.constexpr = 128 * 64 if BM * BN > 128 * 64 else BM * BN // 2
    PIECE: tl.constexpr = BM * BN if BM == BN else HALF
    epilogue(acc, bias, z, g, rm, column * BN, M, N, PIECE)


@triton.jit(do_not_specialize=["M", "MO", "T", "panels", "lead", "stride_xb"])
def pool_linear_kernel(
    x,  # [B, n_in, K] strided
    index,  # [MO, T]
    weight,  # [MO, T]
    w,  # [N, K] strided
    bias,  # [N] or None
    p,  # [B * MO, K]
    z,  # [B * MO, N] or None
    g,  # [B * MO, N] or None
    workspace,  # int32: ticket, finished CTAs, a flag a panel; zero before and after
    M,  # B * MO
    MO,
    N,
    K,
    T,
    panels,
    lead,
    stride_xb,
    stride_xn,
    stride_xk,
    stride_wn,
    stride_wk,
    WINDOW: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    PM: tl.constexpr,
    PK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    SLOTS: tl.constexpr = BM // PM  # pool tasks of a panel
    columns = tl.cdiv(N, BN)  # gemm tasks of a panel
    group = SLOTS + columns
    flags = workspace + HEADER
    task = tl.atomic_add(workspace, 1, sem="relaxed")
    while task < panels * group:
        turn = task - lead * SLOTS
        panel = turn // group
        slot = turn % group
        if turn < 0:
            panel, slot = task // SLOTS, task % SLOTS
        elif panel < panels - lead:
            panel = tl.where(slot < SLOTS, panel + lead, panel)
        else:  # nothing is left to pool
            turn -= (panels - lead) * group
            panel = panels - lead + turn // columns
            slot = SLOTS + turn % columns
        if slot < SLOTS:
            pool_task(
                x, index, weight, p, panel * BM + slot * PM,
                M, MO, K, T, stride_xb, stride_xn, stride_xk, WINDOW, ALIGNED, ACT, PM, PK,
            )  # fmt: skip
            tl.debug_barrier()  # all warps' rows are written before one thread raises the flag
            tl.atomic_add(flags + panel, 1, sem="release")
        else:
            while tl.atomic_add(flags + panel, 0, sem="acquire") < SLOTS:
                pass
            gemm_task(
                p, w, bias, z, g, panel, slot - SLOTS,
                M, N, K, stride_wn, stride_wk, PRECISION, BM, BN, BK,
            )  # fmt: skip
        task = tl.atomic_add(workspace, 1, sem="relaxed")
    # The last CTA to get here leaves the workspace as it found it, for the next launch.
    if tl.atomic_add(workspace + 1, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        for i in range(0, panels + HEADER, 128):
            r = i + tl.arange(0, 128)
            tl.store(workspace + r, tl.zeros([128], dtype=tl.int32), mask=r < panels + HEADER)


def pool_linear(
    x: torch.Tensor,
    index: torch.Tensor,
    weight: torch.Tensor,
    ragged: bool,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    p: torch.Tensor,
    z: torch.Tensor | None,
    g: torch.Tensor | None,
    precision: str,
    config: Config,
    act: str | None = None,
) -> None:
    """Fill ``p`` [B, MO, K] = S act(x), ``z`` [B, MO, N] = p wᵀ + bias and ``g`` = gelu(z)."""
    (batch, tokens, channels), features = p.shape, w.shape[0]
    m, tiles = batch * tokens, config.tiles
    panels, slots = triton.cdiv(m, tiles["BM"]), tiles["BM"] // tiles["PM"]
    tasks = panels * (slots + triton.cdiv(features, tiles["BN"]))
    # Two CTAs an SM; where one fits, the others find no ticket left and exit at once.
    ctas = min(tasks, 2 * chip_of(x.device).sms)
    launch(
        pool_linear_kernel,
        (ctas,),
        config,
        x=x,
        index=index,
        weight=weight,
        w=w,
        bias=bias,
        p=p,
        z=z,
        g=g,
        workspace=workspace_for(x.device, HEADER.value + panels),
        M=m,
        MO=tokens,
        N=features,
        K=channels,
        T=index.shape[1],
        panels=panels,
        lead=min(panels, triton.cdiv(ctas, slots)),  # every CTA's first task is a pool task
        stride_xb=x.stride(0),
        stride_xn=x.stride(1),
        stride_xk=x.stride(2),
        stride_wn=w.stride(0),
        stride_wk=w.stride(1),
        WINDOW=compiled_window(index, ragged),
        ALIGNED=aligned(x.stride(0), x.stride(1)),
        ACT=act,
        PRECISION=precision,
    )
