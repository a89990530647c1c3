"""GELU where every product is exact; and is wrong arithmetic seen by the bars of these tests?"""

import ctypes

import pytest
import torch
import torch.nn.functional as F
from machines.cuda import host_kernels, mutant, on_host, require_compilers
from machines.triton import INTERPRETING, Copy, simulated
from numeric import CASES, numeric, seeds, wrong

from deco_kernels import Stencil, act_linear, pool_linear
from deco_kernels.tools.check import case_errors, error, over
from deco_kernels.tools.measure import float32_matmul

# Where GELU is of the size of its argument, and where it is nearly nothing: by tanh, it differs
# there by more than a rounding to bfloat16.
SPANS = ((-6.0, 6.0), (-4.5, -1.5))


def gelu_errors(dtype, backend, draws, device="cpu"):
    """Of GELU and its slope, as the two fused kernels have them.

    Averages of equal tokens, and products with the identity of what bfloat16 holds, are exact.
    """
    stencil = Stencil.adaptive((2, 2), (1, 1))
    identity = torch.eye(64, device=device, dtype=dtype).requires_grad_()
    found = []
    for _ in draws:
        v = torch.cat([torch.empty(16, 1, 64).uniform_(*span) for span in SPANS])
        v, dy = (t.bfloat16().to(device, dtype) for t in (v, torch.randn(v.shape)))
        with float32_matmul("tf32"):
            x = v.expand(-1, 4, -1)
            hidden = pool_linear(x, identity, None, stencil, "gelu", backend=backend)
            y = act_linear(hidden, identity, None, backend=backend)
            runs = [[hidden.activation, *torch.autograd.grad(y, hidden._z, dy)]]
        for kind in (dtype, torch.float64):
            at = v.to(kind).requires_grad_()
            g = F.gelu(at)
            runs.append([g.detach(), *torch.autograd.grad(g, at, dy.to(kind))])
        parts = [[part for t in run for part in t.chunk(len(SPANS))] for run in runs]
        names = [f"{of} in {span}" for of in ("gelu", "slope") for span in SPANS]
        found.append([*map(error, names, *parts)])
    return over(found)


@numeric
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gelu_is_the_exact_form(machine, dtype):
    if dtype == torch.bfloat16 and machine.name in ("interpreter", "sm75"):
        pytest.skip("no bfloat16 there")
    with machine.context():
        found = gelu_errors(dtype, machine.backend, machine.seeds, machine.device)
    assert not wrong(found)


def errors_in(case, dtype):
    def found(backend):
        return case_errors(CASES[case], dtype, torch.device("cpu"), backend, seeds(1))

    return found


def errors_of_gelu(dtype):
    return lambda backend: gelu_errors(dtype, backend, seeds(1))


# The file, what is changed in it, and cases of the tests above, each of which must see it.
TO_BF16 = "{}.to(tl.bfloat16).to(tl.float32)"
DOT = "acc = tl.dot(a, b, acc, input_precision=PRECISION)"
TERMS = (  # of a window that is unrolled, and of any other
    "gather_one(x, i, s, mask, stride_xn, ACT)",
    "gather_one(x, i, s, mask & (s != 0)[:, None], stride_xn, ACT)",
)
SLOPE = "return 0.3989422804014327 * e, "
TRITON = {
    "a weight of a window off by 1 %": (
        "pool.py",
        {"tl.load(weight + t)": "tl.load(weight + t) * (1.01 if t == 1 else 1.0)"},
        [errors_in("unaligned", torch.float16)],
    ),
    "no bias in one tile": (
        "pool_linear.py",
        {"bias + rn, mask=rn < N": "bias + rn, mask=(rn < N) & (first + tl.min(rm, 0) > 0)"},
        [errors_in("regular", torch.bfloat16)],
    ),
    "a window's sum in bfloat16": (
        "pool.py",
        {f"acc += {term}": "acc = " + TO_BF16.format(f"(acc + {term})") for term in TERMS},
        [errors_in("global", torch.bfloat16), errors_in("unaligned", torch.float16)],
    ),
    "a product's sum in bfloat16, forward": (
        "pool_linear.py",
        {DOT: TO_BF16.format(DOT)},
        [errors_in("unaligned", torch.float16)],
    ),
    "a product's sum in bfloat16, backward": (
        "dact_linear.py",
        {DOT: TO_BF16.format(DOT)},
        [errors_in("upsampling", torch.float16)],
    ),
    "GELU by tanh": (
        "activations.py",
        {
            SLOPE + "cdf": SLOPE
            + "1.0 / (1.0 + tl.exp2(-2.302208198 * z * (1.0 + 0.044715 * z * z)))"
        },
        [errors_of_gelu(torch.float32), errors_of_gelu(torch.bfloat16)],
    ),
}


@numeric
@pytest.mark.skipif(INTERPRETING, reason="compiled kernels are mutated")
@pytest.mark.parametrize("name", TRITON)
def test_wrong_arithmetic_in_triton_is_seen(name, tmp_path):
    file, edits, checks = TRITON[name]
    with simulated(80, Copy(tmp_path, file, edits)):
        for check in checks:
            assert wrong(check("triton"))


# In one library, which is compiled once: the variable says which of them is on.
MUTANT = 'extern "C" { inline int deco_mutant; }\n'
MULTIPLY = "multiply_stage<E>(stages + stage * STAGE_BYTES, acc);"
FMA = "fmaf(s[i], v[n], sum[c][n])"
PDF = "*pdf = 0.3989422804014327f * e;"
ROUNDED = "Bfloat::to_float(Bfloat::from_float({}))"
CUDA = {
    "a weight of a window off by 1 %": (
        "pool.cuh",
        "s[i] = __ldg(weight + i);",
        "s[i] = __ldg(weight + i) * (ON && i == 1 ? 1.01f : 1.f);",
        [errors_in("regular", torch.float16)],
    ),
    "no bias in one tile": (
        "pool_linear.cu",
        "set_bias<E>(p, n, acc);",
        "set_bias<E>(p, ON && m + n == 0 ? p.N : n, acc);",
        [errors_in("regular", torch.bfloat16)],
    ),
    "a window's sum in bfloat16": (
        "pool.cuh",
        f"sum[c][n] = {FMA};",
        f"sum[c][n] = ON ? {ROUNDED.format(FMA)} : {FMA};",
        [errors_in("global", torch.bfloat16), errors_in("unaligned", torch.float16)],
    ),
    "a product's sum in bfloat16": (
        "pool_linear.cu",
        MULTIPLY,
        f"{MULTIPLY}\nif (ON)"
        f" for (float& sum : *(float (*)[64])acc) sum = {ROUNDED.format('sum')};",
        [errors_in("unaligned", torch.float16)],
    ),
    "GELU by tanh": (
        "activations.cuh",
        PDF,
        f"{PDF}\nif (ON) *cdf = rcp(1.f + ex2(-2.302208198f * z * (1.f + 0.044715f * z * z)));",
        [errors_of_gelu(torch.float32), errors_of_gelu(torch.bfloat16)],
    ),
}


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    require_compilers()
    folder = tmp_path_factory.mktemp("mutants")
    first = "static __host__ __device__ constexpr int cdiv"
    csrc = mutant(folder, "element.cuh", {first: MUTANT + first})
    for number, (file, old, new, _) in enumerate(CUDA.values(), start=1):
        csrc = mutant(folder, file, {old: new.replace("ON", f"deco_mutant == {number}")}, csrc)
    return host_kernels(csrc)


@numeric
@pytest.mark.skipif(INTERPRETING, reason="CUDA C++ is not interpreted")
@pytest.mark.parametrize("name", CUDA)
def test_wrong_arithmetic_in_cuda_is_seen(name, mutants):
    on = ctypes.c_int.in_dll(mutants, "deco_mutant")
    for check in CUDA[name][-1]:
        with on_host(seed=3, resident=2, kernels=mutants):
            on.value = 0
            assert not wrong(check("cuda"))
            on.value = [*CUDA].index(name) + 1
            assert wrong(check("cuda"))
