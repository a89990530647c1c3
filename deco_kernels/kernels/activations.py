"""Activations and their derivatives, elementwise on float32 blocks.

At the edges they are what torch's float32 gives: for every finite z a finite number, and at
infinities inf, and NaN where torch has 0 * inf: the value at -inf and the slope at either. One
difference: torch's slope of gelu_tanh is NaN from where z squared overflows, 1.8e19; here it is 1
or 0, as it is below.
"""

import triton
import triton.language as tl


@triton.jit
def normal(z, EXACT: tl.constexpr):
    """Density and distribution function of the standard normal at z.

    Unless EXACT, the distribution is the rational form 7.1.26 of Abramowitz and Stegun: absolute
    error below 1.5e-7, with half of erf's instructions. As a multiple of the density it stays
    below half a bfloat16 ulp of gelu(z) down to z = -5, where gelu(z) is -1.4e-6.
    """
    e = tl.exp2(z * z * -0.7213475204444817)  # exp(-z^2 / 2)
    if EXACT:
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    else:
        t = tl.fdiv(1.0, tl.abs(z) * 0.23164188814867655 + 1.0)
        q = 0.5307027145 * t - 0.7265760135
        q = q * t + 0.7107068705
        q = q * t - 0.142248368
        q = q * t + 0.127414796
        tail = q * t * e
        cdf = tl.where(z < 0, tail, 1.0 - tail)
    return 0.3989422804014327 * e, cdf


@triton.jit
def gelu(z, EXACT: tl.constexpr):
    _, cdf = normal(z, EXACT)
    return z * cdf


@triton.jit
def gelu_and_slope(z, EXACT: tl.constexpr):
    pdf, cdf = normal(z, EXACT)
    return z * cdf, cdf + z * pdf


@triton.jit
def gate(z, ACT: tl.constexpr):
    """The activations ``z * sigmoid(h(z))``: the sigmoid, and the derivative of h."""
    tl.static_assert(ACT == "gelu_tanh" or ACT == "silu" or ACT == "quick_gelu")
    if ACT == "gelu_tanh":  # 0.5 (1 + tanh(u)) = sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
        square = tl.minimum(z * z, 1e30)  # finite, so that 0 times the slope is 0
        h = z * (1.5957691216057308 + 0.07135481282553 * square)
        slope = 1.5957691216057308 + 0.21406443847659 * square
    elif ACT == "quick_gelu":
        h, slope = 1.702 * z, 1.702
    else:
        h, slope = z, 1.0
    return tl.fdiv(1.0, 1.0 + tl.exp(-h)), slope


@triton.jit
def act(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    if ACT == "gelu":
        y = gelu(z, EXACT)
    else:
        s, _ = gate(z, ACT)
        y = z * s
    return y


@triton.jit
def act_slope(z, ACT: tl.constexpr, EXACT: tl.constexpr):
    if ACT == "gelu":
        _, dy = gelu_and_slope(z, EXACT)
    else:
        s, slope = gate(z, ACT)
        dy = s + slope * s * (1.0 - s) * z  # z comes last: times a slope it may be infinite
    return dy
