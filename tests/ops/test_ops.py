"""Are the operators what torch expects? Schemas, fakes, derivatives, FLOPs, names."""

import pytest
import torch
from machines.cuda import on_host, require_compilers
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from deco_kernels import (
    FusedAvgPoolProjector,
    Stencil,
    act_linear,
    act_pool_linear,
    pool,
    pool_linear,
)

OPS = torch.ops.deco_kernels
STENCILS = {
    "grid": Stencil.adaptive((5, 4), (3, 3)),
    "tables": Stencil.packed([(3, 4), (4, 2)], target=(3, 1)),
}


@pytest.mark.parametrize("stencil", STENCILS.values(), ids=STENCILS.keys())
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck(batch, stencil):
    x, w = torch.randn(batch, 21, 6)[:, 1:].requires_grad_(), torch.randn(7, 6, requires_grad=True)
    places, n_out = stencil.places(torch.device("cpu"), torch.float32), stencil.n_out
    opcheck(OPS.pool.default, (x, *places, False, torch.float32, "eager"))
    dp = torch.randn(batch, n_out, 6)
    opcheck(OPS.pool.default, (dp.half(), *places, True, torch.float16, "eager"))
    opcheck(OPS.dact_pool.default, (dp, *places, x.detach(), "gelu", "eager"))
    for activation, keep_z in ((None, True), ("gelu", True), ("gelu", False)):
        for bias in (None, torch.randn(7, requires_grad=activation is None)):
            needs = (x, w) if keep_z else (x.detach(), w.detach())
            how = activation, keep_z, None, "eager"
            opcheck(OPS.pool_linear.default, (needs[0], *places, needs[1], None, bias, *how))
    z, g = torch.randn(batch, n_out, 6, requires_grad=True), torch.randn(batch, n_out, 6)
    z_bias = torch.randn(6, requires_grad=True)
    opcheck(OPS.act_linear.default, (z, z_bias, g, w, None, None, "eager"))
    dy, z = torch.randn(n_out * batch, 7), torch.randn(n_out * batch, 6)
    for want_g in (True, False):
        for want_db in (True, False):
            opcheck(OPS.dact_linear.default, (dy, w.detach(), z, want_g, want_db, "eager"))


def test_operators_have_no_second_derivative():
    x = torch.randn(1, 20, 6, requires_grad=True)
    places = STENCILS["grid"].places(x.device, x.dtype)
    p = OPS.pool(x, *places, False, torch.float32, "eager")
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(p.sum(), x, create_graph=True)


def test_memory_is_estimated_with_fake_tensors():
    pack = Stencil.packed([(4, 4), (6, 5)], target=(2, 3))
    with FakeTensorMode():
        fused = FusedAvgPoolProjector(2, 9, 8, 12)
        x = torch.randn(2, 49, 8, requires_grad=True)
        y = fused(x)
        y.sum().backward()
        assert (y.shape, x.grad.shape) == ((2, 9, 12), (2, 49, 8))
        assert pool(torch.randn(1, 46, 8), pack).shape == (1, 12, 8)
    assert type(pool(torch.randn(1, 46, 8), pack)) is torch.Tensor  # what is kept is no fake


def two_layers(x, w1, b1, w2, b2, backend):
    hidden = pool_linear(x, w1, b1, STENCILS["grid"], "gelu", backend=backend)
    return act_linear(hidden, w2, b2, backend=backend)


def leaves():
    shapes = (2, 20, 16), (24, 16), (24,), (32, 24), (32,)
    return [torch.randn(shape).half().requires_grad_() for shape in shapes]


def test_flops_are_those_of_the_products():
    require_compilers()
    tensors = leaves()
    counted = {}
    for backend in ("eager", "cuda"):
        with on_host():
            with FlopCounterMode(display=False) as forward:
                y = two_layers(*tensors, backend)
            with FlopCounterMode(display=False) as backward:
                y.sum().backward()
            with FlopCounterMode(display=False) as after:
                act_pool_linear(tensors[0], tensors[1], None, STENCILS["grid"], backend=backend)
        counted[backend] = [c.get_total_flops() for c in (forward, backward, after)]
    rows = 2 * 9
    first, second = 2 * rows * 16 * 24, 2 * rows * 24 * 32
    assert counted["eager"] == counted["cuda"] == [first + second, 2 * (first + second), first]


@pytest.mark.parametrize("backend", ["eager", "cuda"])
def test_the_profiler_shows_the_packages_name(backend):
    require_compilers()
    with on_host(), torch.profiler.profile() as profile:
        two_layers(*leaves(), backend).sum().backward()
    names = {event.name for event in profile.events()}
    for verb in ("pool_linear", "act_linear"):
        assert f"deco_kernels::{verb}" in names
        assert any(verb in name and "Backward" in name for name in names)
