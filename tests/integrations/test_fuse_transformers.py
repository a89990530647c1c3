"""Does ``fuse`` know the stock classes of transformers, where that library is installed?"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from numeric import numeric, wrong
from stock.kinds import GRIDS, MERGES, TOKENS, Kind, computes, kind_errors

from deco_kernels import fuse, unfuse
from deco_kernels.integrations import explain

transformers = pytest.importorskip("transformers")
ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "quick_gelu")


def perception():
    from transformers.models.perception_lm.modeling_perception_lm import (
        PerceptionLMMultiModalProjector,
    )

    return PerceptionLMMultiModalProjector(
        SimpleNamespace(
            vision_config=SimpleNamespace(model_args={"embed_dim": 8}),
            text_config=SimpleNamespace(hidden_size=12),
            projector_pooling_ratio=2,
        )
    )


def onevision(activation="gelu"):
    from transformers import LlavaOnevisionConfig, LlavaOnevisionModel

    vision = {"hidden_size": 16, "intermediate_size": 24, "image_size": 70, "patch_size": 14}
    text = {"hidden_size": 16, "intermediate_size": 24, "num_key_value_heads": 2, "vocab_size": 64}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **vision, **heads},
        text_config={"model_type": "qwen2", **text, **heads},
        projector_hidden_act=activation,
        image_token_index=1,
        video_token_index=2,
    )
    return LlavaOnevisionModel(config)


def tower():
    from transformers.models.video_llama_3.modeling_video_llama_3 import (
        VideoLlama3VisionConfig,
        VideoLlama3VisionModel,
    )

    sizes = {"hidden_size": 16, "intermediate_size": 24}
    config = VideoLlama3VisionConfig(num_hidden_layers=1, num_attention_heads=2, **sizes)
    return VideoLlama3VisionModel(config)


def frames(model, x):
    y = model.get_video_features(x, vision_feature_layer=-1, vision_feature_select_strategy="full")
    return getattr(y, "pooler_output", y)


def unshuffled(model, x):
    return model.pixel_unshuffle(x, GRIDS, MERGES)


KINDS = {
    "Perception-LM": (perception, (2, 36, 8), lambda m, x: m(x)),
    "LLaVA-OneVision": (onevision, (1, 2, 3, 70, 70), frames),
    "VideoLLaMA 3": (tower, (TOKENS, 16), unshuffled),
}
kinds = pytest.mark.parametrize(("make", "shape", "call"), KINDS.values(), ids=[*KINDS])


@kinds
def test_stock_class(make, shape, call):
    stock = make()
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    assert explain(fused)[""].path == "fused"
    x = torch.randn(shape, requires_grad=True)
    kind = SimpleNamespace(call=call)
    assert computes(fused, kind, x)
    assert not computes(stock, kind, x)
    torch.testing.assert_close(call(fused, x), call(stock, x))
    assert torch.equal(call(copy.deepcopy(fused), x), call(fused, x))
    unfuse(fused)
    assert type(fused) is type(stock)
    assert torch.equal(call(fused, x), call(stock, x))


@numeric
def test_perception_errors():
    stock = perception()
    fused = copy.deepcopy(stock)
    fuse(fused)
    kind = Kind(perception, (2, 1024, 8))
    found = kind_errors(stock, fused, kind, torch.float32)
    assert not wrong(found)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    model = onevision(activation)
    x = torch.randn(1, 2, 3, 70, 70)
    want = frames(model, x)
    assert [*fuse(model).replaced] == [""]
    torch.testing.assert_close(frames(model, x), want)


def test_unknown_activation_is_left_alone():
    assert "activation" in fuse(onevision("relu")).left[""]


def test_class_name_that_a_checkpoint_records(tmp_path):
    model = onevision()
    fuse(model)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["architectures"] == ["LlavaOnevisionModel"]
    again = type(onevision()).from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()


def test_video_through_the_whole_model():
    """A sequence of tokens with a video in it, and gradients of the projector, in float64."""
    stock = onevision().double()
    fused = copy.deepcopy(stock)
    fuse(fused)
    ids = torch.tensor([[3, *[2] * (2 * 9 + 1), 4]])  # two frames of 3 x 3 tokens, a newline
    x = torch.randn(1, 2, 3, 70, 70).double()
    results = []
    for model in (fused, stock):
        y = model(input_ids=ids, pixel_values_videos=x).last_hidden_state
        parameters = model.multi_modal_projector.parameters()
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
