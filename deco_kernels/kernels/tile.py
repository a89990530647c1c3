"""Halves of an accumulator, for epilogues that do not fit into the registers as a whole."""

import triton
import triton.language as tl


@triton.jit
def halves(acc):
    """The left and the right columns of ``acc`` [M, N]: each [M, N / 2]."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(acc.reshape([acc.shape[0], 2, HALF]), [0, 2, 1]))
