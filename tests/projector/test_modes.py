"""Is the drop-in one in torch's modes? In place, autocast, hooks that look on, other tensors."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from machines.cuda import on_host, require_compilers
from stock import PerceptionProjector
from stock.kinds import KINDS, kinds, pair
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from deco_kernels import (
    AvgPoolProjector,
    FusedAvgPoolProjector,
    Stencil,
    act_linear,
    act_pool_linear,
    fuse,
    pool,
    pool_linear,
)
from deco_kernels.functional import _copy_of_autocast
from deco_kernels.integrations import explain
from deco_kernels.tools.measure import saved_bytes

STENCILS = {
    "adaptive": Stencil.adaptive((4, 4), (2, 2)),
    "packed": Stencil.packed([(4, 2), (2, 4)], merge=2),
    "identity": Stencil.identity(16),
}


def scaled(y):
    y *= 0.5
    return y


def blanked(y):
    y[:, 0] = 0
    return y


def dropped(y):
    torch.manual_seed(1)
    return F.dropout(y, 0.5, training=True, inplace=True)


CHANGES = [scaled, blanked, dropped]


def gradients(y, *leaves):
    return torch.autograd.grad(y.float().square().sum(), leaves)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("backend", ["eager", "cuda"])
@pytest.mark.parametrize("stencil", STENCILS.values(), ids=STENCILS.keys())
def test_outputs_of_functions_change_in_place(stencil, backend, change):
    require_compilers()
    dtype = torch.float32 if backend == "eager" else torch.float16
    x, w, v = (torch.randn(s).to(dtype).requires_grad_() for s in ((2, 16, 8), (6, 8), (5, 6)))

    def chain(x):
        hidden = pool_linear(x, w, None, stencil, "gelu", backend=backend)
        return act_linear(hidden, v, None, backend=backend)

    for function in (
        lambda x: pool(x, stencil, backend=backend),
        lambda x: pool_linear(x, w, None, stencil, backend=backend),
        lambda x: act_pool_linear(x, w, None, stencil, backend=backend),
        chain,
    ):
        with on_host():
            found, want = change(function(x)), change(function(x).clone())
            assert torch.equal(found, want)
            assert torch.equal(*(gradients(y, x)[0] for y in (found, want)))


@kinds
@pytest.mark.parametrize("how", ["called", "checkpoint", "compiled"])
@pytest.mark.parametrize("change", CHANGES)
def test_outputs_of_fused_models_change_in_place(kind, how, change):
    if how == "compiled" and (change is dropped or kind is not KINDS["perception"]):
        pytest.skip("compiled code draws other numbers; one kind shows it")
    x, found = torch.randn(kind.shape, requires_grad=True), []
    for module in pair(kind):
        torch.compiler.reset()

        def run(x, module=module):
            y = kind.call(module, x)
            return change(y if isinstance(y, torch.Tensor) else y[0])

        if how == "checkpoint":
            y = checkpoint(run, x, use_reentrant=False)
        else:
            y = (torch.compile(run, backend="aot_eager") if how == "compiled" else run)(x)
        found += [y, *gradients(y, x)]
    if change is dropped and found[0].stride() != found[2].stride():
        return  # numbers are drawn in the order of memory
    torch.testing.assert_close(found[2:], found[:2], rtol=1e-4, atol=1e-5)


def kept_under_autocast(module, x, calls, cache=True):
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
        return saved_bytes(lambda: [module(x) for _ in range(calls)], exclude=module.parameters())


@pytest.mark.parametrize("make", ["projector", "fuse"])
def test_autocast_keeps_one_copy_of_a_weight(make):
    stock = AvgPoolProjector(3, 4, 32, 64) if make == "projector" else PerceptionProjector(32, 64)
    fused = copy.deepcopy(stock)
    if make == "fuse":
        assert fuse(fused).replaced
    else:
        fused = FusedAvgPoolProjector.from_reference(fused)
    x = torch.randn(1, 16, 32).bfloat16().requires_grad_()
    kept = [kept_under_autocast(fused, x, calls) for calls in (1, 2, 17)]
    assert kept[2] - kept[1] == 15 * (kept[1] - kept[0])
    for calls in (1, 2, 17):
        assert kept_under_autocast(fused, x, calls) <= kept_under_autocast(stock, x, calls)


def test_autocast_shares_its_copy_with_torch_and_gradients_reach_the_parameter():
    weight = nn.Parameter(torch.randn(6, 8))
    x = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():  # what is cached here must not lose the gradient for later calls
            z = pool_linear(x, weight, None, STENCILS["adaptive"])
        copies = [_copy_of_autocast(weight, torch.bfloat16) for _ in range(2)]
        y = F.linear(x, weight)
        z = pool_linear(x, weight, None, STENCILS["adaptive"])
    assert copies[0].data_ptr() == copies[1].data_ptr()
    (ours,), (torchs,) = torch.autograd.grad(z.sum(), weight), torch.autograd.grad(y.sum(), weight)
    assert ours.dtype == torchs.dtype == torch.float32
    assert torchs.any()
    with torch.autocast("cpu", torch.bfloat16):  # another region casts anew
        with torch.no_grad():
            weight.mul_(2)
        doubled = pool_linear(x, weight, None, STENCILS["adaptive"])
    torch.testing.assert_close(doubled, 2 * z, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("mode", ["frozen", "inference", "no cache", "not a leaf", "hooks"])
def test_weights_that_autocast_keeps_no_copy_of(mode):
    weight = torch.randn(6, 8, requires_grad=mode != "frozen")
    used = weight * 1 if mode == "not a leaf" else weight
    x, stencil = torch.randn(2, 16, 8, requires_grad=True), STENCILS["adaptive"]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
    with (
        torch.autocast("cpu", torch.bfloat16, cache_enabled=mode != "no cache"),
        torch.inference_mode(mode == "inference"),
    ):
        if mode == "hooks":
            with hooks:
                z = pool_linear(x, used, None, stencil)
        else:
            z = pool_linear(x, used, None, stencil)
        want = F.linear(pool(x, stencil).bfloat16(), used)
    torch.testing.assert_close(z, want)
    if mode not in ("frozen", "inference"):
        grads = (torch.autograd.grad(t.float().sum(), weight, retain_graph=True) for t in (z, want))
        torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


class Trackers:
    """Torch's own tools that register global module hooks."""

    @staticmethod
    def flops(module):
        return FlopCounterMode(display=False)

    @staticmethod
    def modules(module):
        return ModuleTracker()

    @staticmethod
    def memory(module):
        tracker = MemTracker()
        tracker.track_external(module)
        return tracker


@pytest.mark.parametrize("tool", ["flops", "modules", "memory"])
def test_tools_that_look_on_do_not_switch_fusion_off(tool):
    fused = FusedAvgPoolProjector(2, 4, 8, 12)
    model = nn.ModuleList([fused, PerceptionProjector(8, 12)])
    fuse(model)
    x = torch.randn(2, 16, 8)
    with getattr(Trackers, tool)(model):
        for module in model:
            module(x).sum().backward()
    assert {name: plan.last for name, plan in explain(model).items()} == {
        "0": "fused",
        "1": "fused",
    }


@pytest.mark.parametrize("kind", ["seed", "llava, average", "encoder"])
def test_explain_tells_the_last_calls_path(kind):
    kind = KINDS[kind]
    _, fused = pair(kind)
    x = torch.randn(kind.shape, requires_grad=True)
    (name,) = explain(fused)
    assert explain(fused)[name].last is None
    kind.call(fused, x)
    assert explain(fused)[name].last == "fused"
    assert str(explain(fused)[name]).endswith("(last call: fused)")


def test_explain_follows_what_happens_to_layers():
    model = nn.ModuleDict({"projector": FusedAvgPoolProjector(2, 4, 8, 12)})
    projector, x = model["projector"], torch.randn(2, 16, 8)
    projector(x)
    handle = projector.mlp_projector[0].register_forward_hook(lambda m, a, y: y)
    plan = explain(model)["projector"]
    assert (plan.path, plan.last) == ("pooled", "fused")
    projector(x)
    assert projector.explain().last == "pooled"
    handle.remove()
    assert (projector.explain().path, projector.explain().last) == ("fused", "pooled")


REFUSED = {
    "dtype": (lambda m: m, lambda: torch.randn(2, 16, 8).half(), TypeError),
    "channels": (lambda m: m, lambda: torch.randn(2, 16, 9), ValueError),
    "tokens": (lambda m: m, lambda: torch.randn(2, 15, 8), ValueError),
    "a layer of another dtype": (
        lambda m: m.mlp_projector[2].half(),
        lambda: torch.randn(2, 16, 8),
        TypeError,
    ),
}


@pytest.mark.parametrize(("change", "make", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_explain_never_says_fused_of_what_a_call_refuses(change, make, error):
    projector = FusedAvgPoolProjector(2, 4, 8, 12)
    change(projector)
    for call in (projector, projector.explain):
        with pytest.raises(error):
            call(make())


def test_a_model_with_a_projector_that_refuses():
    projector = FusedAvgPoolProjector(2, 4, 8, 12)
    projector.mlp_projector[2].half()
    plan = explain(nn.ModuleList([projector]))["0"]
    assert plan.path == "refused"
    assert "hidden is torch.float32, but weight is torch.float16" in plan.reason


@pytest.fixture
def mesh():
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_dtensor_tokens_take_torchs_own_operators(mesh):
    stock = AvgPoolProjector(2, 4, 8, 12)
    local, found = torch.randn(2, 16, 8), []
    perception = PerceptionProjector(8, 12)
    fuse(perception)
    tokens = DTensor.from_local(local, mesh, [Shard(0)])
    try:
        F.adaptive_avg_pool2d(tokens.view(2, 8, 4, 4), 2)
    except NotImplementedError:
        pytest.skip("this torch pools no DTensors")
    for module in (stock, FusedAvgPoolProjector.from_reference(copy.deepcopy(stock)), perception):
        distribute_module(module, mesh)
        x = DTensor.from_local(local.clone().requires_grad_(), mesh, [Shard(0)])
        y = module(x)
        assert type(y) is DTensor
        y.sum().backward()
        found.append(y.full_tensor())
    torch.testing.assert_close(found[0], found[1])
    with pytest.raises(TypeError, match=r"^x must be an ordinary tensor, got DTensor"):
        pool(x, STENCILS["adaptive"])


@pytest.fixture
def projectors():
    """The oracle, a fused one that shares its parameters, and tokens."""
    stock = AvgPoolProjector(2, 4, 8, 12)
    return stock, FusedAvgPoolProjector.from_reference(stock), torch.randn(1, 16, 8)


def test_batched_gradients(projectors):
    stock, fused, x = projectors
    found = [
        torch.autograd.functional.jacobian(module, x, vectorize=True) for module in (stock, fused)
    ]
    torch.testing.assert_close(*found)
    x.requires_grad_()
    stencils = STENCILS["adaptive"], Stencil.bilinear((4, 4), (2, 2))
    for function in (fused, *(lambda t, s=s: pool(t, s) for s in stencils)):
        y = function(x)
        each = torch.eye(y.numel()).view(-1, *y.shape)
        one = torch.func.vmap(lambda dy, y=y: torch.autograd.grad(y, x, dy, retain_graph=True)[0])
        want = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in each])
        torch.testing.assert_close(one(each), want)


@pytest.mark.parametrize("layer_num", [1, 3])
def test_autocast_keeps_copies_of_before_a_step_as_stock_does(layer_num):
    """Also of biases: an optimizer's step inside of a region changes what the next region sees."""
    stock, x = AvgPoolProjector(layer_num, 4, 8, 12), torch.randn(1, 16, 8)
    found = []
    for make in (lambda m: m, FusedAvgPoolProjector.from_reference):
        module = copy.deepcopy(stock)
        run = make(module)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                y = run(x)
                y.float().sum().backward()
                with torch.no_grad():
                    for p in module.parameters():
                        p -= 0.5 * p.grad
        found.append([y, *(p.grad for p in module.parameters())])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


def test_autocast_where_hooks_of_saved_tensors_are_forbidden(projectors):
    _, fused, x = projectors
    forbidden = torch.autograd.graph.disable_saved_tensors_hooks("none here")
    with forbidden, torch.autocast("cpu", torch.bfloat16):
        assert fused(x).dtype == torch.bfloat16


def test_a_new_object_of_a_fused_class_is_a_stock_one():
    module = PerceptionProjector(8, 12)
    fuse(module)
    again = type(module)(8, 12)
    assert type(again) is PerceptionProjector
    assert fuse(again).replaced
