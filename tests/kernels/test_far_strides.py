"""Are elements found that lie further apart than an int32 counts? In the interpreter."""

import re

import pytest
import torch
from machines.triton import INTERPRETING, interpreted

from deco_kernels import Stencil
from deco_kernels.backends import eager
from deco_kernels.backends import triton as verbs

FAR = (1 << 25) + 8  # elements: 2**31 are 64 times that, and a loop's second step begins there
STENCIL = Stencil.adaptive((4, 4), (2, 2))


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_the_interpreter_finds_them():
    """In a process of its own, as a wrapped offset ends it: with a report of which one it was."""
    run = interpreted(__file__, "-v")
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert re.search(r"\b9 passed", run.stdout) or "no address space" in run.stdout


@pytest.fixture
def far(monkeypatch):
    """Makes random float16 with strides; most of the memory that they span is never touched."""
    if not INTERPRETING:
        pytest.skip("Triton decides on import: see test_the_interpreter_finds_them")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)

    def make(shape, strides):
        span = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
        try:
            memory = torch.empty(span, dtype=torch.float16)
        except RuntimeError:
            pytest.skip(f"there is no address space for {span} elements")
        return memory.as_strided(shape, strides).normal_()

    return make


def assert_near(found, want):
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=5e-2)


def assert_pool_linear(w):
    x, rows = torch.randn(2, 16, w.shape[1]).half(), STENCIL.tables("cpu", torch.float32)[0]
    found = verbs.pool_linear(x, rows, w, None, "gelu", True)
    assert_near(found, eager.pool_linear(x, rows, w.contiguous(), None, "gelu", True))


def test_far_columns_of_the_weight(far):
    assert_pool_linear(far((16, 128), (1, FAR)))


def test_far_rows_of_the_weight(far):
    assert_pool_linear(far((128, 16), (FAR, 1)))


def assert_dact_linear(dy, w):
    z = torch.randn(len(dy), w.shape[1]).half()
    found = verbs.dact_linear(dy, w, z, True, False)[:2]
    assert_near(found, eager.dact_linear(dy.contiguous(), w.contiguous(), z, True, False)[:2])


def test_far_columns_of_the_weight_backward(far):
    assert_dact_linear(torch.randn(4, 16).half(), far((16, 128), (1, FAR)))


def test_far_rows_of_the_weight_backward(far):
    assert_dact_linear(torch.randn(4, 128).half(), far((128, 16), (FAR, 1)))


def test_far_columns_of_the_gradient(far):
    assert_dact_linear(far((4, 128), (1, FAR)), torch.randn(128, 16).half())


def test_far_rows_of_the_gradient(far):
    assert_dact_linear(far((128, 16), (FAR, 1)), torch.randn(16, 16).half())


def assert_pool(x):
    rows, columns = STENCIL.tables("cpu", torch.float32)
    assert_near(
        [verbs.pool(x, rows, x.dtype, "gelu")], [eager.pool(x.contiguous(), rows, x.dtype, "gelu")]
    )
    dp = torch.randn(len(x), STENCIL.n_out, x.shape[2]).half()
    found = verbs.dact_pool(dp, columns, x, "gelu")
    assert_near([found], [eager.dact_pool(dp, columns, x.contiguous(), "gelu")])


def test_far_images(far):
    assert_pool(far((2, 16, 8), (80 * FAR, 8, 1)))


def test_far_tokens(far):
    assert_pool(far((1, 16, 8), (0, 5 * FAR, 1)))


def test_far_channels(far):
    assert_pool(far((1, 16, 80), (0, 1, FAR)))
