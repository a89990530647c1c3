"""What do the bindings refuse, before they launch anything?"""

import os

import pytest
import torch
from machines.cuda import NAME, host_kernels, mutant, on_host, require_compilers

from deco_kernels import Stencil
from deco_kernels.host import library

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not Triton's")


@pytest.fixture(autouse=True)
def _compilers():
    require_compilers()


def good_pool():
    (index, weight, ragged, _), _ = Stencil.adaptive((4, 4), (2, 2)).tables("cpu", torch.float32)
    return {
        "x": torch.randn(2, 16, 8),
        "index": index,
        "weight": weight,
        "ragged": ragged,
        "act": "gelu",
        "z": None,
        "p": torch.empty(2, 4, 8),
    }


def good_pool_linear():
    p = good_pool()
    return {
        **{k: p[k] for k in ("x", "index", "weight", "ragged", "act")},
        "w": torch.randn(24, 8),
        "bias": torch.randn(24),
        "p": p["p"],
        "z": torch.empty(2, 4, 24),
        "g": torch.empty(2, 4, 24),
        "workspace": torch.zeros(3, dtype=torch.int32),
        "sms": 2,
    }


def good_dgelu():
    return {
        "d": torch.randn(70, 24),
        "z": torch.randn(70, 24),
        "g": torch.empty(70, 24),
        "sums": torch.empty(2, 24),
    }


def good_dact_pool():
    """Its output and z of another dtype than x."""
    half = torch.empty(2, 4, 8, dtype=torch.float16)
    return {**good_pool(), "z": torch.zeros_like(half), "p": half}


GOOD = {
    "pool": good_pool,
    "dact_pool": good_dact_pool,
    "pool_linear": good_pool_linear,
    "dgelu": good_dgelu,
}
META = torch.empty(2, 16, 8, device="meta")
BAD = [
    ("pool", {"x": META}, RuntimeError, "must be on a cpu device, got one on meta"),
    ("pool", {"p": META}, RuntimeError, "p must be on cpu, got meta"),
    ("pool", {"x": torch.randn(16, 8)}, ValueError, r"x must be \[B, n_in, K\], got \[16, 8\]"),
    ("pool", {"x": torch.randn(2, 16, 8).double()}, TypeError, "x must be float32, .* got Double"),
    ("pool", {"p": torch.empty(2, 4, 9)}, ValueError, r"p must be \[2, 4, 8\], got \[2, 4, 9\]"),
    ("pool", {"p": torch.empty(2, 8, 4).mT}, ValueError, "p must be contiguous, got strides"),
    ("pool", {"index": torch.zeros(4, 4)}, TypeError, "index must be Int, got Float"),
    ("pool", {"weight": torch.ones(4, 3)}, ValueError, r"weight must be \[4, 4\], got \[4, 3\]"),
    (
        "pool",
        {"x": torch.empty(0, 16, 8), "p": torch.empty(0, 4, 8)},
        ValueError,
        r"B \* MO must be from 1 to 2147483647, got 0",
    ),
    (
        "pool",
        {"x": torch.empty(1, 1, 1).expand(2**30, 16, 8), "p": torch.empty(1).expand(2**30, 4, 8)},
        ValueError,
        "p must be contiguous",
    ),
    (
        "pool",
        {"act": "relu"},
        ValueError,
        "act must be None, gelu, gelu_tanh, silu or quick_gelu, got relu",
    ),
    ("pool_linear", {"act": ""}, ValueError, "act must be None, gelu, .*, got $"),
    ("dact_pool", {"act": None}, ValueError, "act must be given with z, got None"),
    ("dact_pool", {"z": META}, RuntimeError, "z must be on cpu, got meta"),
    ("dact_pool", {"z": torch.randn(2, 4, 8)}, TypeError, "z must be Half, got Float"),
    (
        "dact_pool",
        {"z": torch.empty(2, 4, 7).half()},
        ValueError,
        r"z must be \[2, 4, 8\], got \[2, 4, 7\]",
    ),
    ("pool_linear", {"w": torch.randn(24)}, ValueError, r"w must be \[N, K\], got \[24\]"),
    ("pool_linear", {"w": torch.randn(24, 8).half()}, TypeError, "w must be Float, got Half"),
    ("pool_linear", {"bias": torch.randn(8)}, ValueError, r"bias must be \[24\], got \[8\]"),
    ("pool_linear", {"g": torch.empty(2, 4, 8)}, ValueError, r"g must be \[2, 4, 24\]"),
    (
        "pool_linear",
        {"workspace": torch.zeros(2, dtype=torch.int32)},
        ValueError,
        "workspace must hold 3 integers, got 2",
    ),
    ("pool_linear", {"sms": 0}, ValueError, "sms must be from 1 to"),
    ("dgelu", {"d": torch.randn(24)}, ValueError, r"d must be \[M, N\], got \[24\]"),
    ("dgelu", {"z": torch.randn(70, 23)}, ValueError, r"z must be \[70, 24\], got \[70, 23\]"),
    ("dgelu", {"sums": torch.empty(1, 24)}, ValueError, r"sums must be \[2, 24\], got \[1, 24\]"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), BAD)
def test_bindings_check_before_they_launch(name, change, error, message):
    verb = "pool" if name == "dact_pool" else name
    with on_host():  # builds them
        operator = getattr(library.operators(torch.device("cpu")), verb)
        operator(*GOOD[name]().values())
    with pytest.raises(error, match=message):
        getattr(getattr(torch.ops, NAME), verb)(*{**GOOD[name](), **change}.values())


def test_a_failed_launch_is_an_error_with_the_reason(tmp_path):
    csrc = mutant(tmp_path, "dgelu.cu", {"constexpr int WARPS = 8;": "constexpr int WARPS = 64;"})
    with (
        on_host(kernels=host_kernels(csrc)),
        pytest.raises(RuntimeError, match=r"launched: .*grid"),
    ):
        library.operators(torch.device("cpu")).dgelu(*good_dgelu().values())
