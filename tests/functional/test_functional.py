"""Do the functions differentiate, and keep and compute no more than a gradient needs?"""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from deco_kernels import Stencil, act_linear, backends, pool, pool_linear
from deco_kernels.tools.measure import saved_bytes

STENCIL = Stencil.adaptive((5, 4), (3, 3))


def reference(x, *layers, grid_out=(3, 3), grid=(5, 4)):
    """Torch's own operators: pool, then linear layers with GELU between them."""
    y = F.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, grid), grid_out)
    y = y.flatten(2).transpose(1, 2)
    for i, (w, b) in enumerate(layers):
        y = F.linear(F.gelu(y) if i else y, w, b)
    return y


def ours(x, *layers, stencil=STENCIL):
    if not layers:
        return pool(x, stencil)
    (w, b), *rest = layers
    y = pool_linear(x, w, b, stencil, "gelu" if rest else None)
    for i, (w, b) in enumerate(rest):
        y = act_linear(y, w, b, "gelu" if i + 1 < len(rest) else None)
    return y


def problem(layer_num, bias=True, dtype=torch.double, batch=2, **grad):
    r = torch.Generator().manual_seed(layer_num)

    def randn(*shape):
        return torch.randn(*shape, generator=r, dtype=torch.double).to(dtype).requires_grad_()

    sizes = [6, 7, 5, 8][: layer_num + 1]
    layers = [(randn(n, k), randn(n) if bias else None) for k, n in pairwise(sizes)]
    return randn(batch, 20, 6), layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layer_num", [0, 1, 2, 3])
def test_gradcheck(layer_num, bias):
    x, layers = problem(layer_num, bias)
    flat = [t for layer in layers for t in layer if t is not None]

    def function(x, *flat):
        it = iter(flat)
        return ours(x, *((next(it), next(it) if bias else None) for _ in layers))

    assert gradcheck(function, (x, *flat))
    torch.testing.assert_close(ours(x, *layers), reference(x, *layers), rtol=1e-13, atol=1e-13)


FROZEN = {
    "nothing": "",
    "tower": "x",
    "first weight": "w0",
    "first layer": "w0 b0",
    "all before the last": "x w0 b0",
    "weights": "w0 w1",
    "last layer": "w1 b1",
    "all but the first bias": "x w0 w1 b1",
    "all but the last bias": "x w0 b0 w1",
    "all": "x w0 b0 w1 b1",
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN.keys())
def test_only_what_a_gradient_needs_is_kept_and_computed(frozen, monkeypatch):
    x, layers = problem(2)
    named = {"x": x}
    for i, (w, b) in enumerate(layers):
        named |= {f"w{i}": w, f"b{i}": b}
    for name in frozen.split():
        named[name].requires_grad_(False)
    alive = {n: t for n, t in named.items() if t.requires_grad}
    calls = []
    eager = backends.get("eager")
    for verb in ("pool", "dact_linear"):
        real = getattr(eager, verb)
        monkeypatch.setattr(
            eager, verb, lambda *a, real=real, verb=verb: calls.append((verb, a[3:])) or real(*a)
        )
    y = ours(x, *layers)
    assert y.requires_grad == bool(alive)
    rows, hidden, out = 2 * 9, 7, 5
    size = saved_bytes(lambda: ours(x, *layers), exclude=named.values())
    before_last = bool({"x", "w0", "b0"} & alive.keys())
    kept_p = rows * 6 * ("w0" in alive)
    kept_hidden = rows * hidden * (before_last or "w1" in alive)  # Z, or G where Z is useless
    assert size == 8 * (kept_p + kept_hidden)
    calls.clear()
    if alive:
        dy = torch.randn(2, 9, out, dtype=torch.double)
        found = torch.autograd.grad(y, list(alive.values()), dy)
        want = torch.autograd.grad(reference(x, *layers), list(alive.values()), dy)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert [args for verb, args in calls if verb == "dact_linear"] == (
        [("w1" in alive, "b0" in alive)] if before_last else []
    )
    assert len([verb for verb, _ in calls if verb == "pool"]) == ("x" in alive)


@pytest.mark.parametrize("layer_num", [0, 1, 2, 3])
def test_empty_batch(layer_num):
    x, layers = problem(layer_num, batch=0)
    y = ours(x, *layers)
    assert y.shape == reference(x, *layers).shape
    for grad, leaf in zip(
        torch.autograd.grad(y.sum(), [x, *(t for layer in layers for t in layer)]),
        [x, *(t for layer in layers for t in layer)],
        strict=True,
    ):
        assert grad.shape == leaf.shape
        assert not grad.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("view", ["cls sliced", "transposed", "expanded", "every other channel"])
def test_any_strides(view, dtype):
    base = torch.randn(3, 21, 12).to(dtype)
    x = {
        "cls sliced": base[:, 1:, :6],
        "transposed": torch.randn(3, 6, 20).to(dtype).transpose(1, 2),
        "expanded": base[:1, 1:, :6].expand(3, 20, 6),
        "every other channel": base[:, :20, ::2],
    }[view]
    _, layers = problem(2, dtype=dtype)
    assert torch.equal(ours(x, *layers), ours(x.contiguous(), *layers))


@pytest.mark.parametrize("leaf", ["nan", "inf"])
def test_non_finite_tokens_stay_in_their_windows(leaf):
    """Ragged windows are padded: the padding must not carry a NaN elsewhere."""
    x = torch.randn(1, 20, 2)
    x[0, 0] = float(leaf)
    torch.testing.assert_close(pool(x, STENCIL), reference(x), equal_nan=True)


@pytest.mark.parametrize("layer_num", [1, 2, 3])
@pytest.mark.parametrize("square", [True, False], ids=["varying", "constant"])
def test_double_backward_is_an_error(layer_num, square):
    """Also where the gradient that comes in is a constant."""
    x, layers = problem(layer_num)
    y = ours(x, *layers)
    y = y.square().sum() if square else y.sum()
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(y, x, create_graph=True)


@pytest.mark.parametrize("layer_num", [1, 2, 3])
def test_autocast_is_that_of_torch(layer_num):
    x, layers = problem(layer_num, dtype=torch.float32)
    leaves = [x, *(t for layer in layers for t in layer)]
    with torch.autocast("cpu", torch.bfloat16):
        found, want = ours(x, *layers), reference(x, *layers)
    assert found.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(found, want)
    grads = torch.autograd.grad(found.float().square().sum(), leaves)
    assert all(g.dtype == torch.float32 for g in grads)
    wanted = torch.autograd.grad(want.float().square().sum(), leaves)
    torch.testing.assert_close(grads, wanted, rtol=2e-2, atol=2e-2)


def test_hidden_is_detached_where_it_shows():
    x, (layer, _) = problem(2)
    hidden = pool_linear(x, *layer, STENCIL, "gelu")
    assert hidden.shape == (2, 9, 7)
    assert not hidden.activation.requires_grad
    torch.testing.assert_close(hidden.activation, F.gelu(reference(x, layer)).detach())
