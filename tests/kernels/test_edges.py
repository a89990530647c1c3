"""What becomes of NaN, infinities, and the smallest and largest numbers? What torch makes of them.

Every token (or its gradient) in turn holds such a number, in a channel of its own.
"""

import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from machines.cuda import on_host, on_ptx, require_compilers
from machines.triton import INTERPRETING, interpreted, simulated

from deco_kernels import Stencil, backends, pool
from deco_kernels.functional import TOKEN_ACTIVATIONS

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LARGEST = torch.finfo(FP32).max
INF, NAN = float("inf"), float("nan")
VALUES = {"NaN": NAN, "inf": INF, "-inf": -INF, "denormal": 1e-40, "largest": LARGEST}


class Geometry(NamedTuple):
    """A stencil, and torch's own pooling of tokens [B, n_in, K]."""

    stencil: Stencil
    torch: Callable[[torch.Tensor], torch.Tensor]


def on_grid(grid, pooling, *options):
    """A pooling of [B, K, h, w] as one of tokens."""
    return lambda x: pooling(x.mT.unflatten(2, grid), *options).flatten(2).mT


def in_turn(x):
    """Images of 5 x 5 and of 3 x 4 tokens, to 3 x 3."""
    parts = zip(x.split([25, 12], 1), [(5, 5), (3, 4)], strict=True)
    return torch.cat([on_grid(grid, F.adaptive_avg_pool2d, 3)(part) for part, grid in parts], 1)


GEOMETRIES = {
    "adaptive, ragged": Geometry(
        Stencil.adaptive((5, 5), (3, 3)), on_grid((5, 5), F.adaptive_avg_pool2d, 3)
    ),
    "adaptive, regular": Geometry(
        Stencil.adaptive((4, 6), (2, 3)), on_grid((4, 6), F.adaptive_avg_pool2d, (2, 3))
    ),
    "bilinear": Geometry(
        Stencil.bilinear((5, 5), (3, 3)),
        on_grid((5, 5), F.interpolate, (3, 3), None, "bilinear"),
    ),
    "fixed, padded": Geometry(
        Stencil.fixed((5, 5), 3, stride=2, padding=1), on_grid((5, 5), F.avg_pool2d, 3, 2, 1)
    ),
    "packed": Geometry(Stencil.packed([(5, 5), (3, 4)], target=(3, 3)), in_turn),
}
# Where ours is not torch's, and why.
DIFFERENCES = {
    "bilinear": "F.interpolate multiplies neighbours whose weight is exactly 0 and so spreads their"
    " infinities and NaN; no backend reads a token without a weight",
    "gelu_tanh": "torch's slope is 0 times infinity where z squared overflows; ours is 1 or 0",
}


class Place(NamedTuple):
    """Whose kernels run, and where."""

    backend: str
    name: str

    @property
    def device(self):
        return "cuda:0" if self.name == "gpu" else "cpu"

    def context(self):
        if self.name == "host":
            return on_host()
        if self.name.startswith("sm"):
            return (on_ptx if self.backend == "cuda" else simulated)(int(self.name[2:]))
        return nullcontext()


PLACES = [
    Place("triton", "interpreter"),
    Place("triton", "sm80"),
    Place("composed", "sm80"),
    Place("cuda", "host"),
    Place("cuda", "sm80"),
    pytest.param(Place("triton", "gpu"), marks=pytest.mark.gpu),
    pytest.param(Place("cuda", "gpu"), marks=pytest.mark.gpu),
    Place("eager", "cpu"),
]


@pytest.fixture(params=PLACES, ids="-".join)
def place(request):
    backend, name = request.param
    if (name == "interpreter") != INTERPRETING:
        pytest.skip("Triton decides on import: see test_the_interpreter_agrees")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "gpu":
        reason = backends.unusable(backend, torch.device("cuda:0"), FP16)
        if reason:
            pytest.skip(reason)
    elif backend == "cuda":
        require_compilers(ptx=name != "host")
    return request.param


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_the_interpreter_agrees():
    run = interpreted(__file__, "-q", "-k", "interpreter")
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 20


def each_in_turn(tokens, aligned):
    """[1, tokens, K]: for every value of the table and every token a channel with that value."""
    channels = []
    for value in VALUES.values():
        base = torch.zeros(tokens, tokens) if value == 1e-40 else torch.rand(tokens, tokens)
        channels.append(base.fill_diagonal_(value))
    x = torch.cat(channels, 1)
    missing = -x.shape[1] % 16 if aligned else 1 - x.shape[1] % 2
    return F.pad(x, (0, missing))[None]


def matrix_of(stencil):
    rows, _ = stencil.tables()
    return torch.zeros(stencil.n_out, stencil.n_in).scatter_add_(
        1, rows.index.long(), rows.weight.float()
    )


def without_zeros(matrix, x):
    """The product of a matrix and tokens [B, n, K], of weights other than 0 only."""
    terms = torch.where(matrix[..., None] != 0, matrix[..., None] * x[:, None], 0.0)
    return terms.sum(2)


def assert_same(found, want):
    torch.testing.assert_close(found.cpu(), want, rtol=1e-5, atol=1e-44, equal_nan=True)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_tokens_are_pooled_as_torch_does(place, name, aligned):
    stencil, pooling = GEOMETRIES[name]
    x = each_in_turn(stencil.n_in, aligned)
    want = pooling(x)
    if name in DIFFERENCES:
        want = without_zeros(matrix_of(stencil), x)
    with place.context():
        found = pool(x.to(place.device), stencil, backend=place.backend)
    assert_same(found, want)


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradients_are_as_torch_has_them(place, name, aligned):
    stencil, pooling = GEOMETRIES[name]
    dp = each_in_turn(stencil.n_out, aligned)
    x = torch.zeros(1, stencil.n_in, dp.shape[2]).requires_grad_()
    (want,) = torch.autograd.grad(pooling(x), x, dp)
    if name in DIFFERENCES:
        want = without_zeros(matrix_of(stencil).T, dp)
    x = x.detach().to(place.device).requires_grad_()
    with place.context():
        p = pool(x, stencil, backend=place.backend)
        (found,) = torch.autograd.grad(p, x, dp.to(place.device))
    assert_same(found, want)


def test_bilinear_is_another_where_a_weight_is_0_and_only_there():
    stencil, pooling = GEOMETRIES["bilinear"]
    x = each_in_turn(stencil.n_in, True)
    ours, theirs = without_zeros(matrix_of(stencil), x), pooling(x)
    other = ~torch.isclose(ours, theirs, equal_nan=True)
    assert other.any()
    assert not other[:, :, x.isfinite().all(1).flatten()].any()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_what_the_dtype_cannot_hold_is_infinite(place, dtype):
    """Tokens that are too large, and sums of gradients, where a token is in several windows."""
    if dtype == BF16 and INTERPRETING:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    if dtype == BF16 and place.backend == "eager":
        pytest.skip("torch divides the sum of a window, which may overflow; kernels sum shares")
    largest, stencil = torch.finfo(dtype).max, Stencil.adaptive((3, 3), (7, 7))
    sides = stencil.tables(place.device, FP32)
    x = torch.tensor([LARGEST, -LARGEST, largest, 1.0]).repeat(2).expand(1, 9, 8).contiguous()
    dp = torch.tensor([1.0, -1.0]).repeat(4).expand(1, 49, 8).to(dtype) * largest
    with place.context():
        p = backends.get(place.backend).pool(x.to(place.device), sides[0], dtype)
        dx = backends.get(place.backend).pool(dp.to(place.device), sides[1], dtype)
    assert_same(p, x[:, :1].to(dtype).expand(1, 49, 8))
    assert_same(dx, (matrix_of(stencil).double().T @ dp.double()).to(dtype))
    assert dx.isinf().all()


ACTS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def edges(dtype):
    """Of activations: numbers at which something in them over- or underflows, and beside them."""
    finite = [0.0, 1e-45, 1e-40, 6e-8, 1.0, 9.0, 13.0, 60.0, 88.0, 104.0, 3e4, 6.5e4]
    finite += [1e12, 1e14, 1e18, 2e19, 1e25, 1e38, 2e38, 3e38, torch.finfo(dtype).max]
    z = torch.tensor([v for v in finite if v <= torch.finfo(dtype).max] + [INF])
    return torch.cat([z, -z, torch.tensor([NAN])]).to(dtype)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("act", TOKEN_ACTIVATIONS)
def test_activations_and_slopes_are_those_of_torch(place, act, dtype):
    if dtype == BF16 and INTERPRETING:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    z = edges(dtype)
    wide = z.float().requires_grad_()
    value = ACTS[act](wide)
    (slope,) = torch.autograd.grad(value.sum(), wide)
    if act in DIFFERENCES and place.backend != "eager":
        other = slope.isnan() & z.isfinite()
        assert (other == ((z.abs() > 1.8e19) & z.isfinite())).all()
        slope = torch.where(other, (z > 0).float(), slope)
    x = z[None, :, None].expand(1, -1, 8).contiguous().to(place.device)
    ones, sides = torch.ones_like(x), Stencil.identity(len(z)).tables(place.device, FP32)
    with place.context():
        verbs = backends.get(place.backend)
        y, dx = verbs.pool(x, sides[0], dtype, act), verbs.dact_pool(ones, sides[1], x, act)
    eps = torch.finfo(dtype).eps
    for ours, want in zip((y, dx), (value, slope), strict=True):
        want = want.detach().to(dtype)[None, :, None].expand(1, -1, 8)
        torch.testing.assert_close(ours.cpu(), want, rtol=4 * eps, atol=1e-6, equal_nan=True)
