"""Does a model see its projector's output as a tensor, though it is not computed yet?"""

import copy
import io
import pickle
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from stock import LlavaLike
from stock.kinds import KINDS, computes, videos
from torch import nn

from deco_kernels import fuse


def test_the_view_leaves_the_model_as_it_is():
    """What the model's own code stores goes to the model, and it sees its own projector."""

    class Storing(LlavaLike):
        def encode_images(self, images):
            projector = self.get_model().mm_projector
            self.seen = projector[0].in_features, len(list(projector.parameters()))
            features = projector(images)
            assert isinstance(features, torch.Tensor)
            self.shape = features.shape
            return features * 1.0

    stock, fused = Storing(), None
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    x = torch.randn(6, 49, 8)
    torch.testing.assert_close(videos(fused, x), videos(stock, x))
    assert fused.seen == stock.seen == (8, 4)
    assert fused.shape == stock.shape
    assert fused.get_model() is fused.model
    assert type(fused.model.mm_projector) is nn.Sequential


def with_attribute(features):
    features.image_sizes = [1]
    assert features.image_sizes == [1]
    features.data = features.data + 1
    return features


def in_place(features):
    features += 1
    features.mul_(2)
    return features


TOUCHES = {
    "nothing": lambda f: f,
    "index": lambda f: f[:],
    "iterate": lambda f: torch.stack(list(f)),
    "concatenate": lambda f: torch.cat([f[:2], *f[2:].split(1)]),
    "stack": lambda f: torch.stack([f, f])[0],
    "in place": in_place,
    "arithmetic": lambda f: 2 * f - f / 3 + 1,
    "matmul": lambda f: f @ torch.eye(12),
    "compare": lambda f: f * (f > 0),
    "function": lambda f: torch.nn.functional.normalize(f, dim=-1),
    "split channels": lambda f: torch.cat(torch.split(f, 5, dim=-1), -1),
    "split twice": lambda f: torch.cat([*f.split(2)[:2], f.split([4, 2])[1]]),
    "shape": lambda f: f.view(*f.shape[:2], -1) * len(f),
    "cast": lambda f: f.to(torch.float64).float(),
    "detach": lambda f: f.detach(),
    "absolute": abs,
    "floor of a number": lambda f: 5 // f,
    "remainder of a number": lambda f: 5 % f,
    "attribute": with_attribute,
    "numpy": lambda f: f + torch.from_numpy(np.asarray(f.detach())) + np.float32(1),
    "text": lambda f: f * len(f"{f!r}"),
}


class Touching(LlavaLike):
    touch = "nothing"

    def encode_images(self, images):
        features = self.get_model().mm_projector(images)
        assert isinstance(features, torch.Tensor)
        assert torch.is_tensor(features)
        return TOUCHES[self.touch](features)


@pytest.mark.parametrize("touch", TOUCHES)
def test_what_a_model_does_before_it_pools_is_done(touch):
    stock = Touching()
    stock.touch = touch
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    x = torch.randn(6, 49, 8)
    torch.testing.assert_close(videos(fused, x), videos(stock, x))


def test_what_was_changed_in_place_is_pooled():
    class Doubling(LlavaLike):
        def encode_multimodals(self, videos_or_images, video_idx_in_batch, split_sizes=None):
            features = self.get_model().mm_projector(videos_or_images)
            features.mul_(2)
            return [self.get_2dPool(features, 2), features], []

    stock = Doubling()
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    x = torch.randn(6, 49, 8)
    got, want = fused.encode_multimodals(x, [0])[0], stock.encode_multimodals(x, [0])[0]
    torch.testing.assert_close(got, want)
    assert [type(y) for y in got] == [torch.Tensor] * 2


TOLD = {
    "shape": lambda f: f.shape,
    "size": lambda f: (f.size(), f.size(1), f.size(dim=-1)),
    "dim": lambda f: (f.dim(), f.ndim, len(f)),
    "dtype": lambda f: f.dtype,
    "device": lambda f: f.device,
    "requires_grad": lambda f: f.requires_grad,
}


class Telling(LlavaLike):
    def encode_images(self, images):
        features = super().encode_images(images)
        self.told = {name: tell(features) for name, tell in TOLD.items()}
        return features


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("projector", [None, "linear"])
def test_what_is_known_is_told_without_computing_it(autocast, tracked, projector):
    stock = Telling(projector=projector and nn.Linear(8, 12))
    fused = copy.deepcopy(stock)
    fuse(fused)
    x = torch.randn(6, 49, 8)
    with torch.set_grad_enabled(tracked), torch.autocast("cpu", torch.bfloat16, autocast):
        for model in (stock, fused):
            y = model([x], ["video"])
            assert y.requires_grad == tracked
    assert fused.told == stock.told
    call = KINDS["llava, average"]._replace(call=lambda m, x: m([x], ["video"]))
    assert computes(fused, call, x)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.autocast])
def test_the_modes_of_the_projectors_call_hold(mode):
    """Whatever they are where its output is pooled or touched, and the other way round."""
    options = ("cpu", torch.bfloat16) if mode is torch.autocast else ()

    class Inside(LlavaLike):
        def encode_images(self, images):
            with mode(*options):
                return super().encode_images(images)

    class Outside(LlavaLike):
        def prepare_inputs_labels_for_multimodal(self, images, modalities):
            features = self.encode_images(torch.cat(images))
            with mode(*options):
                return self.get_2dPool(features) if modalities == ["video"] else 2 * features

    x = torch.randn(6, 49, 8)
    for kind in (Inside, Outside):
        stock = kind()
        fused = copy.deepcopy(stock)
        assert [*fuse(fused).replaced] == [""]
        for modality in ("video", "image"):
            got, want = fused([x], [modality]), stock([x], [modality])
            assert (got.dtype, got.requires_grad) == (want.dtype, want.requires_grad)
            torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


Named = namedtuple("Named", "features more")
RESULTS = {
    "dict": lambda f: {"features": f, "more": 1},
    "nested": lambda f: ({"all": [f, (f, 1)]}, OrderedDict(f=f)),
    "namedtuple": lambda f: Named(f, 1),
}


@pytest.mark.parametrize("result", RESULTS.values(), ids=[*RESULTS])
def test_what_is_returned_is_finished(result):
    class Returning(LlavaLike):
        def forward(self, images):
            return self.prepare_inputs_labels_for_multimodal(images)

        def prepare_inputs_labels_for_multimodal(self, images):
            return result(self.encode_images(images))

    stock = Returning()
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    x = torch.randn(6, 49, 8)
    got, want = fused(x), stock(x)
    leaves, structure = torch.utils._pytree.tree_flatten(got)
    expected, same = torch.utils._pytree.tree_flatten(want)
    assert structure == same
    assert [*map(type, leaves)] == [*map(type, expected)]
    torch.testing.assert_close(leaves, expected)


def test_what_is_stored_on_the_model_is_pickled_as_a_tensor():
    class Storing(LlavaLike):
        def encode_images(self, images):
            self.features = {"f": super().encode_images(images)}
            return self.features["f"]

    stock = Storing()
    fused = copy.deepcopy(stock)
    fuse(fused)
    x = torch.randn(6, 49, 8)
    for model in (stock, fused):
        with torch.no_grad():
            videos(model, x)
    want, file = stock.features["f"], io.BytesIO()
    torch.save(fused.features, file)
    file.seek(0)
    for found in (
        pickle.loads(pickle.dumps(fused.features)),
        torch.load(file),
        copy.deepcopy(fused.features),
        {"f": copy.copy(fused.features["f"])},
    ):
        assert type(found["f"]) is torch.Tensor
        assert torch.equal(found["f"], want)
    assert f"{fused.features['f']}" == f"{want}"
