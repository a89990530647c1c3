"""Does ``fuse`` leave alone what it does not know exactly, and say why?"""

import pytest
import torch
from stock import (
    AttentionResampler,
    EncoderTower,
    LlavaLike,
    LoraLinear,
    PerceptionProjector,
    RatioPooling,
    SeedProjector,
    UnshufflingTower,
    downsample_one_by_one,
)
from stock.kinds import KINDS, Called, pair, videos
from torch import nn

import deco_kernels
from deco_kernels import FusedAvgPoolProjector, fuse, unfuse
from deco_kernels.integrations import explain


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vision = nn.Sequential(AttentionResampler(), nn.Linear(8, 8))
        self.projector = PerceptionProjector()
        self.shared = self.projector
        self.video = LlavaLike("max")


def test_report_of_a_whole_model():
    model = Model()
    report = fuse(model)
    assert [*report.replaced] == ["projector"]
    assert [*report.left] == ["vision.0", "video"]
    assert model.shared is model.projector
    assert str(report).splitlines() == [
        "replaced:",
        "  projector: adaptive average pooling by a ratio, before linear_2",
        "left:",
        "  vision.0: pooling by attention is no average: it does not commute with a linear layer",
        "  video: get_2dPool pools by maximum, which does not commute with a linear layer",
    ]
    assert str(unfuse(model)) == "replaced:\n  projector: PerceptionProjector\nleft: nothing"
    assert "projector.linear_1.weight" in model.state_dict()


class MaxPooling(RatioPooling):
    pass


class Residual(PerceptionProjector):
    def forward(self, features):
        return super().forward(features) + 1


class Dropping(PerceptionProjector):
    def forward(self, features):
        return super().forward(nn.functional.dropout(features, 0.5, self.training))


class Clamping(PerceptionProjector):
    def forward(self, features):
        return super().forward(features).clamp(-30, 30)


class Cleaning(PerceptionProjector):
    def forward(self, features):
        return torch.nan_to_num(super().forward(features))


class OtherWhereLong(PerceptionProjector):
    def forward(self, features):
        return super().forward(features) * (2 if features.shape[1] > 100 else 1)


class CleaningPool(LlavaLike):
    def get_2dPool(self, image_feature, stride=2):
        return super().get_2dPool(image_feature.nan_to_num(), stride)


class OtherPool(LlavaLike):
    def get_2dPool(self, image_feature, stride=2):
        return 2 * super().get_2dPool(image_feature, stride)


class OtherTower(EncoderTower):
    def forward(self, pixel_values, grid_sizes, merge_sizes=None):
        x = self.encoder(self.embeddings(pixel_values), merge_sizes, grid_sizes)
        return downsample_one_by_one(self.post_layernorm(x), grid_sizes, merge_sizes)


class OtherUnshuffle(UnshufflingTower):
    def pixel_unshuffle(self, hidden_states, grid_thw, merge_sizes):
        return super().pixel_unshuffle(hidden_states, grid_thw, merge_sizes) + 1


def with_pooling(pooling):
    module = PerceptionProjector()
    module.pooling = pooling
    return module


def with_layer(module, name):
    module.add_module(name, nn.Linear(3, 3))
    return module


def with_method(module):
    module.encode_multimodals = module.encode_multimodals
    return module


class Final(PerceptionProjector):
    def __init_subclass__(cls, **kwargs):
        raise TypeError("no")


def overridden():
    module = PerceptionProjector()
    module.forward = lambda x: x
    return module


class FancyProjector(nn.Module):
    pass


LEFT = {
    "maximum": (lambda: with_pooling(MaxPooling(2)), "max pooling (MaxPooling) does not commute"),
    "attention": (lambda: with_pooling(AttentionResampler()), "has weights: it is no average"),
    "no pooling": (lambda: PerceptionProjector(ratio=1), "it pools nothing"),
    "unknown pooling": (
        lambda: with_pooling(nn.AvgPool2d(2)),
        "the pooling AvgPool2d is not known here",
    ),
    "residual": (Residual, "its forward is not the one known here: it computes something else"),
    "dropout": (Dropping, "its forward is not the one known here: it computes something else"),
    "clamping": (Clamping, "its forward is not the one known here: it computes something else"),
    "cleaning": (Cleaning, "its forward is not the one known here: it computes something else"),
    "long": (OtherWhereLong, "its forward is not the one known here: it computes something else"),
    "cleaning pool": (CleaningPool, "get_2dPool is not the one known here: it computes something"),
    "another layer": (
        lambda: with_layer(PerceptionProjector(), "extra"),
        "it has more layers than expected: extra",
    ),
    "ReLU": (lambda: PerceptionProjector(act=nn.ReLU()), "the activation ReLU is not known here"),
    "overridden": (overridden, "its forward is replaced on the instance"),
    "fused by hand": (
        lambda: FusedAvgPoolProjector(2, 4, 8, 12),
        "it is a FusedAvgPoolProjector already",
    ),
    "seed, rectangle": (lambda: _seed(nn.AdaptiveAvgPool2d((2, 3))), "AdaptiveAvgPool2d to a"),
    "seed, maximum": (lambda: _seed(nn.AdaptiveMaxPool2d(2)), "module must have a sampler"),
    "llava, maximum": (lambda: LlavaLike("max"), "pools by maximum"),
    "llava, no mode": (lambda: LlavaLike(None), "not known here"),
    "llava, other pool": (OtherPool, "get_2dPool is not the one known here: it computes"),
    "llava, other projector": (
        lambda: LlavaLike(projector=AttentionResampler()),
        "mm_projector (AttentionResampler) is not known here",
    ),
    "other encoder": (OtherTower, "its forward is not the one known here: it calls its layers"),
    "other unshuffle": (OtherUnshuffle, "its pixel_unshuffle is not the one known here"),
    "llava, replaced method": (
        lambda: with_method(LlavaLike()),
        "encode_multimodals is replaced on the instance",
    ),
    "no subclass": (Final, "it cannot be tried out: TypeError: no"),
    "unknown": (FancyProjector, "it is not built like a pooled projector known here"),
}


def _seed(sampler):
    module = SeedProjector()
    module.sampler = sampler
    return module


@pytest.mark.parametrize(("make", "reason"), LEFT.values(), ids=[*LEFT])
def test_left_alone_with_the_reason(make, reason):
    module = make()
    own, random = type(module), torch.get_rng_state()
    report = fuse(module)
    assert torch.equal(torch.get_rng_state(), random)
    assert not report.replaced
    assert [*report.left] == [""]
    assert reason in report.left[""]
    assert type(module) is own
    assert all(type(module) is FusedAvgPoolProjector for _ in explain(module))


def test_a_global_hook_leaves_all_alone():
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: y)
    try:
        assert "global" in fuse(PerceptionProjector()).left[""]
    finally:
        handle.remove()
    _, fused = pair(KINDS["perception"])
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: y)
    try:
        assert explain(fused)[""].path == "stock"
    finally:
        handle.remove()


def test_the_pooling_mode_is_looked_up_in_every_call():
    stock, fused = pair(KINDS["llava, average"])
    x = torch.randn(6, 49, 8)
    for model in (stock, fused):
        model.config.mm_spatial_pool_mode = "max"
    assert torch.equal(videos(fused, x), videos(stock, x))
    assert explain(fused)[""].reason == "the model pools by 'max' now"


def test_a_wrapper_that_answers_for_its_model_is_not_the_model():
    """As PEFT's and torch.compile's do."""

    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inside = model

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inside, name)

    for make in (LlavaLike, PerceptionProjector, UnshufflingTower, EncoderTower, SeedProjector):
        wrapper = Wrapper(make())
        assert [*fuse(wrapper).replaced] == ["inside"]
        assert type(wrapper) is Wrapper
        assert [*explain(wrapper)] == ["inside"]
        assert [*unfuse(wrapper).replaced] == ["inside"]


def test_a_class_of_the_same_name_is_told_apart():
    """As PEFT's ``Linear``, which wraps torch's."""
    linear = type("Linear", (LoraLinear,), {"__module__": "peft.tuners"})
    _, fused = pair(KINDS["perception"])
    fused.linear_2 = linear(fused.linear_2)
    assert explain(fused)[""].reason == "linear_2 is peft.tuners.Linear"
    fused.linear_2 = fused.linear_2.base
    fused.linear_2.register_forward_hook(lambda m, a, y: None)
    assert explain(fused)[""].reason == "linear_2 is hooked"


def test_layers_added_to_a_projector_are_seen():
    stock, fused = pair(KINDS["llava, average"])
    more = nn.GELU(), nn.Linear(12, 12)
    for model in (stock, fused):
        model.model.mm_projector.extend(more)
    x = torch.randn(6, 49, 8)
    assert torch.equal(videos(fused, x), videos(stock, x))
    assert explain(fused)[""].reason == "it has 5 layers now"


@pytest.mark.parametrize("name", ["unshuffling tower", "encoder"])
def test_in_a_compiled_function_images_are_downsampled_one_by_one(name):
    kind = KINDS[name]
    stock, fused = pair(kind)
    x = torch.randn(kind.shape)
    compiled = torch.compile(Called(fused, kind.call), backend="eager")
    torch.testing.assert_close(compiled(x), kind.call(stock, x))


def test_in_a_compiled_graph_a_model_runs_its_own_code():
    stock, fused = pair(KINDS["llava, average"])
    x = torch.randn(6, 49, 8)
    compiled = torch.compile(lambda x: videos(fused, x), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), videos(stock, x))


def test_class_changed_again_is_left_by_unfuse():
    _, fused = pair(KINDS["perception"])
    fused.__class__ = type("Wrapped", (type(fused),), {})  # as sharding and parametrising do
    assert "its class was changed again, to Wrapped" in unfuse(fused).left[""]


def test_forward_replaced_behind_is_left_by_unfuse():
    _, fused = pair(KINDS["perception"])
    fused.forward = fused.forward
    assert "its forward was replaced" in unfuse(fused).left[""]
    del fused.forward
    assert unfuse(fused).replaced


def test_merge_sizes_that_do_not_divide_take_the_stock_loop():
    stock, fused = pair(KINDS["unshuffling tower"])
    grids, merges = torch.tensor([[1, 3, 6]]), torch.tensor([2])
    x = torch.randn(18, 8)
    assert torch.equal(fused(x, grids, merges), stock(x, grids, merges))


def test_exported():
    assert deco_kernels.fuse is fuse
    assert {"fuse", "unfuse"} <= set(deco_kernels.__all__)
