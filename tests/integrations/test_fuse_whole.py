"""Does ``fuse`` work on whole models, whatever else is in them, and leave no trace of a trial?"""

from functools import wraps

import pytest
import torch
from stock import (
    LlavaLike,
    PerceptionProjector,
    Quantised,
    RatioPooling,
    SeedProjector,
    UnshufflingTower,
)
from stock.kinds import KINDS, computes, pair
from torch import nn

from deco_kernels import fuse
from deco_kernels.integrations import explain


def float32(base):
    class Single(base):
        def forward(self, x):
            return super().forward(x).float()

    return Single()


class SinglePool(LlavaLike):
    def get_2dPool(self, image_feature, stride=2):
        return super().get_2dPool(image_feature, stride).float()


class NotLoaded(LlavaLike):
    def get_vision_tower(self):
        raise RuntimeError("not loaded")


class NoModel(LlavaLike):
    def get_model(self):
        raise RuntimeError("no model")


class Frozen(PerceptionProjector):
    def __setattr__(self, name, value):
        if name == "__class__":
            raise RuntimeError("frozen")
        super().__setattr__(name, value)


def with_layers(make):
    """A projector like DeCo's whose linear layers are made anew."""
    module = SeedProjector()
    mlp = module.mlp_projector
    mlp[0], mlp[2] = make(mlp[0]), make(mlp[2])
    return module


def with_buffer():
    module = PerceptionProjector()
    bias = module.linear_2.bias.detach()
    del module.linear_2.bias
    module.linear_2.register_buffer("bias", bias)
    return module


ODD = {
    "float32, seed": (lambda: float32(SeedProjector), "it returned torch.float32 for"),
    "float32, perception": (lambda: float32(PerceptionProjector), "it returned torch.float32 for"),
    "float32, llava": (SinglePool, "it returned torch.float32 for"),
    "quantised": (lambda: with_layers(Quantised), "mlp_projector[0] is Quantised"),
    "lazy": (lambda: with_layers(lambda m: nn.LazyLinear(12)), "must be linear, got LazyLinear"),
    "no tower": (NotLoaded, "RuntimeError: not loaded"),
    "no model": (NoModel, "RuntimeError: no model"),
    "frozen class": (Frozen, "it cannot be tried out: RuntimeError: frozen"),
    "bias is a buffer": (with_buffer, "linear_2 has partitioned or special parameters"),
}


@pytest.mark.parametrize(("make", "reason"), ODD.values(), ids=[*ODD])
def test_the_odd_one_is_left_and_the_others_are_fused(make, reason):
    model = nn.ModuleDict({"a": SeedProjector(), "odd": make(), "z": PerceptionProjector()})
    own = type(model.odd)
    report = fuse(model)
    assert [*report.replaced] == ["a", "z"]
    assert [*report.left] == ["odd"]
    assert reason in report.left["odd"]
    assert type(model.odd) is own
    assert [*explain(model)] == ["a", "z"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_and_traced_modules_are_passed_over():
    x = torch.randn(2, 36, 8)
    tower = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.GELU()))
    traced = torch.jit.trace(SeedProjector(), x)
    model = nn.ModuleDict({"tower": tower, "projector": PerceptionProjector(), "traced": traced})
    report = fuse(model)
    assert [*report.replaced] == ["projector"]
    assert not report.left
    assert not fuse(traced).replaced


def test_layers_quantised_behind():
    stock, fused = pair(KINDS["seed"])
    for module in (stock, fused):
        mlp = module.mlp_projector
        mlp[0], mlp[2] = Quantised(mlp[0]), Quantised(mlp[2])
    x = torch.randn(2, 25, 8)
    assert explain(fused)[""].reason == "mlp_projector[0] is Quantised, or hooked"
    assert torch.equal(fused(x), stock(x))


@pytest.mark.parametrize("name", ["seed", "perception", "pllava", "llava, average"])
def test_a_bias_that_becomes_a_buffer(name):
    kind = KINDS[name]
    stock, fused = pair(kind)
    for module in (stock, fused):
        linear = module.get_submodule(kind.last)
        bias = linear.bias.detach()
        del linear.bias
        linear.register_buffer("bias", bias)
    x = torch.randn(kind.shape)
    assert torch.equal(kind.call(fused, x), kind.call(stock, x))
    assert "partitioned or special" in explain(fused)[""].reason


def storing(base, method):
    """A class whose ``method`` counts its calls and keeps what it got."""

    class Storing(base):
        def __init__(self):
            super().__init__()
            self.calls, self.got = 0, []
            if method != "forward":  # projectors with buffers are left alone
                self.register_buffer("count", torch.zeros(()))
                self.register_buffer("last", None)

    @wraps(getattr(base, method))
    def store(self, x, *args):
        self.calls += 1
        self.got.append(x)
        for name in self._buffers:
            setattr(self, name, x if name == "last" else self.count.add_(1))
        return getattr(base, method)(self, x, *args)

    setattr(Storing, method, store)
    return Storing()


@pytest.mark.parametrize(
    ("base", "method"),
    [
        (LlavaLike, "get_2dPool"),
        (UnshufflingTower, "pixel_unshuffle"),
        (SeedProjector, "forward"),
        (PerceptionProjector, "forward"),
    ],
)
def test_a_trial_leaves_no_trace(base, method):
    model = storing(base, method)
    assert [*fuse(model).replaced] == [""]
    assert (model.calls, model.got) == (0, [])
    assert (model._buffers.get("count", 0), model._buffers.get("last")) == (0, None)


def test_a_trial_leaves_no_trace_in_the_pooling():
    class Storing(RatioPooling):
        def forward(self, x):
            self.got = x
            return super().forward(x)

    model = PerceptionProjector()
    model.pooling = Storing(2)
    assert [*fuse(model).replaced] == [""]
    assert not hasattr(model.pooling, "got")


@pytest.fixture
def mesh():
    if not torch.distributed.is_available():
        pytest.skip("torch is built without distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped")
@pytest.mark.parametrize("name", ["seed", "perception"])
@pytest.mark.parametrize("around", ["module", "layer"])
def test_sharded_by_fsdp2(mesh, name, around):
    """Around a module it gathers the weights for a call, around a layer for that layer's call."""
    kind = KINDS[name]
    stock, fused = pair(kind)
    sharded = fused if around == "module" else fused.get_submodule(kind.last)
    torch.distributed.fsdp.fully_shard(sharded, mesh=mesh)
    x = torch.randn(kind.shape, requires_grad=True)
    assert explain(fused)[""].path == "stock"
    assert computes(fused, kind, x) == (around == "module")
    torch.testing.assert_close(fused(x), stock(x))
