"""Does bad input get a clear error, before anything is launched?"""

import pytest
import torch

from deco_kernels import (
    FusedAvgPoolProjector,
    Stencil,
    act_linear,
    act_pool_linear,
    backends,
    pool,
    pool_linear,
)
from deco_kernels.host import library
from deco_kernels.kernels.launch import Chip, stand_in

STENCIL = Stencil.adaptive((4, 4), (2, 2))
X, W, B = torch.randn(1, 16, 8), torch.randn(6, 8), torch.randn(6)
HIDDEN = pool_linear(X, W, B, STENCIL, "gelu")
V = torch.randn(5, 6)
META = torch.empty(6, 8, device="meta")
HUGE = torch.empty(1, 1, 1).expand(2**55, 16, 8)  # and more once upsampled

BAD_CALLS = {
    "wrong rank": (
        lambda: pool(X[0], STENCIL),
        ValueError,
        r"x must be \[batch, tokens, channels\], got shape \[16, 8\]",
    ),
    "integers": (
        lambda: pool(X.long(), STENCIL),
        TypeError,
        "x must be float16, .* got torch.int64",
    ),
    "complex": (lambda: pool(X + 1j, STENCIL), TypeError, "got torch.complex64"),
    "no tensor": (lambda: pool([1.0], STENCIL), TypeError, "x must be a tensor, got list"),
    "sparse": (lambda: pool(X.to_sparse(), STENCIL), TypeError, "x must be a dense tensor, got la"),
    "nested": (
        lambda: pool(torch.nested.nested_tensor([X[0]]), STENCIL),
        TypeError,
        "x must be a dense tensor, got a nested tensor",
    ),
    "stencil of another grid": (
        lambda: pool(X, Stencil.adaptive((5, 4), (2, 2))),
        ValueError,
        r"x has 16 tokens, but Stencil\(adaptive 5x4 2x2: 20 -> 4 tokens\) takes 20",
    ),
    "no stencil": (lambda: pool(X, (2, 2)), TypeError, "stencil must be a Stencil, got tuple"),
    "weight shape": (
        lambda: pool_linear(X, W[:, 1:], B, STENCIL),
        ValueError,
        r"weight must be \[out, 8\] for the 8 channels of x, got shape \[6, 7\]",
    ),
    "weight rank": (lambda: pool_linear(X, B, None, STENCIL), ValueError, r"got shape \[6\]"),
    "no channels": (
        lambda: pool_linear(X[..., :0], W[:, :0], B, STENCIL),
        ValueError,
        r"x must have channels, got shape \[1, 16, 0\]",
    ),
    "integer weight under autocast": (
        lambda: torch.autocast("cpu")(pool_linear)(X, W.int(), B, STENCIL),
        TypeError,
        "weight must be",
    ),
    "integer weight": (lambda: pool_linear(X, W.int(), B, STENCIL), TypeError, "weight must be"),
    "mixed dtypes": (
        lambda: pool_linear(X, W.half(), B.half(), STENCIL),
        TypeError,
        "x is torch.float32, but weight is torch.float16",
    ),
    "mixed devices": (
        lambda: pool_linear(X, META, None, STENCIL),
        RuntimeError,
        "x is on cpu, but weight is on meta",
    ),
    "bias shape": (
        lambda: pool_linear(X, W, B[1:], STENCIL),
        ValueError,
        r"bias must be \[6\], got shape \[5\]",
    ),
    "bias dtype": (
        lambda: pool_linear(X, W, B.double(), STENCIL),
        TypeError,
        "weight is torch.float32, but bias is torch.float64",
    ),
    "activation": (
        lambda: pool_linear(X, W, B, STENCIL, "relu"),
        ValueError,
        "activation must be None or 'gelu', got 'relu'",
    ),
    "activation of tokens": (
        lambda: act_pool_linear(X, W, B, STENCIL, "relu"),
        ValueError,
        "activation must be None or one of 'gelu', .*'quick_gelu', got 'relu'",
    ),
    "pre-activations of another grid": (
        lambda: act_pool_linear(X[:, 1:], W, B, STENCIL, "silu"),
        ValueError,
        "x has 15 tokens, but .* takes 16",
    ),
    "hidden": (lambda: act_linear(X, V), TypeError, "hidden must come from pool_linear"),
    "hidden's channels": (
        lambda: act_linear(HIDDEN, V.T),
        ValueError,
        r"weight must be \[out, 6\] for the 6 channels of hidden",
    ),
    "over int64": (
        lambda: pool_linear(HUGE, W, B, Stencil.adaptive((4, 4), (8, 8))),
        ValueError,
        "exceeds the int64 range",
    ),
}
BAD_BACKENDS = {
    "unknown backend": (
        lambda: pool(X, STENCIL, backend="tpu"),
        ValueError,
        "backend must be one of auto, triton, cuda, composed, eager; got 'tpu'",
    ),
    "cuda backend": (
        lambda: pool(X, STENCIL, backend="cuda"),
        RuntimeError,
        "backend 'cuda' cannot run here: it needs a CUDA device, the tokens are on cpu",
    ),
    "triton on the CPU": (
        lambda: pool(X, STENCIL, backend="triton"),
        RuntimeError,
        "backend 'triton' cannot run here: it needs a CUDA device, the tokens are on cpu",
    ),
    "triton for float64": (
        lambda: pool(X.double(), STENCIL, backend="triton"),
        RuntimeError,
        "float64 is left to torch",
    ),
    "cuda for float64": (
        lambda: pool(X.double(), STENCIL, backend="cuda"),
        RuntimeError,
        "float64 is left to torch",
    ),
}


@pytest.fixture
def no_launch(monkeypatch):
    """Any computation is a failure."""

    def fail(*args):
        raise AssertionError("launched")

    for verb in ("pool", "dact_pool", "pool_linear", "dact_linear"):
        for name in ("eager", "triton", "cuda"):
            monkeypatch.setattr(backends.get(name), verb, fail)


@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
@pytest.mark.parametrize(("call", "error", "message"), BAD_CALLS.values(), ids=[*BAD_CALLS])
def test_functions(no_launch, monkeypatch, backend, call, error, message):
    for function in (pool, pool_linear, act_linear, act_pool_linear):
        monkeypatch.setitem(function.__kwdefaults__, "backend", backend)
    # Where every backend can run: Triton's kernels, and the library of the CUDA C++ ones.
    usable = stand_in(Chip(90, 1), None), library.stand_in(object())
    with usable[0], usable[1], pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(("call", "error", "message"), BAD_BACKENDS.values(), ids=[*BAD_BACKENDS])
def test_backends(no_launch, call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"query_num": 150}, ValueError, "query_num must be a positive square number, got 150"),
        ({"query_num": 0}, ValueError, "query_num must be at least 1, got 0"),
        ({"query_num": 9.0}, TypeError, "query_num must be an int, got float 9.0"),
        ({"layer_num": 0}, ValueError, "layer_num must be at least 1"),
        ({"mm_hidden_size": -8}, ValueError, "mm_hidden_size must be at least 1, got -8"),
        ({"llm_hidden_size": 0}, ValueError, "llm_hidden_size must be at least 1"),
        ({"backend": "fast"}, ValueError, "backend must be one of"),
    ],
)
def test_projector_sizes(sizes, error, message):
    with pytest.raises(error, match=message):
        FusedAvgPoolProjector(**{"mm_hidden_size": 8, "llm_hidden_size": 8, **sizes})


@pytest.mark.parametrize(
    ("x", "grid", "error", "message"),
    [
        (
            torch.randn(1, 15, 8),
            None,
            ValueError,
            "token count must be a positive square number, got 15; pass",
        ),
        (torch.randn(1, 0, 8), None, ValueError, "must be a positive square number, got 0"),
        (torch.randn(1, 15, 8), (4, 4), ValueError, "grid 4x4 does not hold the 15 tokens of x"),
        (torch.randn(1, 15, 8), (3, 0), ValueError, r"grid\[1\] must be at least 1"),
        (torch.randn(1, 16, 7), None, ValueError, "mm_hidden_size = 8 channels, got 7"),
        (torch.randn(16, 8), None, ValueError, r"x must be \[batch, tokens, channels\]"),
        (torch.ones(1, 16, 8).int(), None, TypeError, "got torch.int32"),
        (torch.randn(1, 16, 8).half(), None, TypeError, "x is torch.float16, but weight is"),
    ],
)
def test_projector_input(no_launch, x, grid, error, message):
    with pytest.raises(error, match=message):
        FusedAvgPoolProjector(2, 4, 8, 8)(x, grid)


def built(sampler, *layers):
    module = torch.nn.Module()
    module.sampler, module.mlp_projector = sampler, torch.nn.Sequential(*layers)
    return module


LINEAR, SQUARE = torch.nn.Linear(8, 8), torch.nn.AdaptiveAvgPool2d((2, 2))


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (LINEAR, r"must have a sampler .* got Linear"),
        (built(torch.nn.AdaptiveMaxPool2d(2), LINEAR), "must have a sampler"),
        (built(torch.nn.AdaptiveAvgPool2d((1, 4)), LINEAR), "must have a sampler"),
        (built(torch.nn.AdaptiveAvgPool2d((2, None)), LINEAR), "must have a sampler"),
        (built(SQUARE), "must have a sampler"),
        (
            built(SQUARE, torch.nn.LayerNorm(8), LINEAR),
            r"mlp_projector\[0\] must be linear, got LayerN",
        ),
        (built(SQUARE, LINEAR, torch.nn.GELU()), r"mlp_projector\[-1\] must be linear, got GELU"),
    ],
)
def test_from_reference_wants_such_a_module(module, message):
    with pytest.raises(TypeError, match=message):
        FusedAvgPoolProjector.from_reference(module)
