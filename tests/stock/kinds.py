"""Everything that ``fuse`` knows: how to make it, call it, and change a layer of it."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from numeric import seeds
from torch import nn
from torch.nn.utils import parametrize

from deco_kernels import fuse
from deco_kernels.tools.check import errors, over
from stock import (
    EncoderTower,
    LlavaLike,
    LoraLinear,
    MatryoshkaLike,
    PerceptionProjector,
    PllavaProjector,
    SeedProjector,
    UnshufflingTower,
)

GRIDS = torch.tensor([[1, 4, 6], [3, 2, 4], [1, 2, 2], [2, 3, 6], [1, 4, 8]])
MERGES = torch.tensor([2, 1, 2, 3, 4])


class Kind(NamedTuple):
    """A stock module, how it is called with tokens of a shape, and its linear layer to change."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    call: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda module, x: module(x)
    last: str | None = None


def videos(model, x):
    """One image of two tiles, a video of three frames, another image."""
    return model(x.split([2, 3, 1]), ["image", "video", "image"])


def faster(model, x):
    model.config.add_faster_video = True
    slow, fast = model.encode_multimodals(x, [0, 2], [2, 3, 1])
    return torch.cat([y.flatten(0, 1) for y in (*slow, fast[0])])


def scaled(scale):
    return lambda model, x: model.prepare_inputs_labels_for_multimodal(x, scale)


def clip(media_type, batch_size, num_videos):
    return lambda module, x: module(x, media_type, batch_size, num_videos)


def images(tower, x):
    return tower(x, GRIDS, MERGES)


TOKENS = int(GRIDS.prod(1).sum())
KINDS = {
    "seed": Kind(SeedProjector, (2, 25, 8), last="mlp_projector.2"),
    "seed, 1 layer": Kind(lambda: SeedProjector(1), (2, 25, 8), last="mlp_projector.0"),
    "perception": Kind(PerceptionProjector, (3, 36, 8), last="linear_2"),
    "perception, ragged": Kind(lambda: PerceptionProjector(ratio=3), (2, 49, 8), last="linear_2"),
    "perception, silu": Kind(
        lambda: PerceptionProjector(act=nn.SiLU(), bias=False), (2, 36, 8), last="linear_2"
    ),
    "perception, tanh": Kind(
        lambda: PerceptionProjector(act=nn.GELU("tanh")), (2, 36, 8), last="linear_2"
    ),
    "pllava": Kind(PllavaProjector, (8, 30, 8), clip("video", 1, 2), "linear_2"),
    "pllava, 8 frames": Kind(PllavaProjector, (8, 30, 8), clip("video", 1, 1), "linear_2"),
    "pllava, few frames": Kind(PllavaProjector, (3, 30, 8), clip("video", 1, 1), "linear_2"),
    "pllava, image": Kind(PllavaProjector, (1, 30, 8), clip("image", 1, 1), "linear_2"),
    "llava, average": Kind(LlavaLike, (6, 49, 8), videos, "model.mm_projector.2"),
    "llava, bilinear": Kind(
        lambda: LlavaLike("bilinear"), (6, 49, 8), videos, "model.mm_projector.2"
    ),
    "llava, linear": Kind(
        lambda: LlavaLike(projector=nn.Linear(8, 12)), (6, 49, 8), videos, "model.mm_projector"
    ),
    "llava, three layers": Kind(
        lambda: LlavaLike(
            projector=nn.Sequential(
                *(nn.Linear(8, 10), nn.GELU(), nn.Linear(10, 9), nn.GELU(), nn.Linear(9, 12))
            )
        ),
        (6, 49, 8),
        videos,
        "model.mm_projector.4",
    ),
    "llava, faster": Kind(lambda: LlavaLike(side=9), (6, 81, 8), faster, "model.mm_projector.2"),
    "matryoshka": Kind(MatryoshkaLike, (2, 36, 8), scaled(9), "model.mm_projector.2"),
    "matryoshka, ragged": Kind(MatryoshkaLike, (2, 36, 8), scaled(7), "model.mm_projector.2"),
    "matryoshka, unpooled": Kind(MatryoshkaLike, (2, 36, 8), scaled(None), "model.mm_projector.2"),
    "unshuffling tower": Kind(UnshufflingTower, (TOKENS, 8), images),
    "encoder": Kind(EncoderTower, (TOKENS, 8), images),
}
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=[*KINDS])
projecting = pytest.mark.parametrize(
    "kind", [k for k in KINDS.values() if k.last], ids=[n for n, k in KINDS.items() if k.last]
)


class Called(nn.Module):
    """A module that is called in its kind's way."""

    def __init__(self, module, call):
        super().__init__()
        self.module, self.call = module, call

    def forward(self, x):
        return self.call(self.module, x)


def pair(kind, **options):
    """A stock module, and one with equal parameters that is fused."""
    torch.manual_seed(seeds()[0])
    stock = kind.make()
    fused = copy.deepcopy(stock)
    report = fuse(fused, **options)
    assert [*report.replaced] == [""], report
    return stock, fused


def kind_errors(stock, fused, kind, dtype):
    """The errors of output and gradients."""
    stock, fused = (Called(module.to(dtype), kind.call) for module in (stock, fused))
    found = []
    for _ in seeds():
        x = torch.randn(kind.shape).to(dtype)
        found.append(errors(fused, stock, x, torch.randn_like(stock(x))))
    return over(found)


def computes(module, kind, x):
    """Whether the package's own functions computed the output."""
    y = kind.call(module, x)
    names, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        names.add(node.name())
        todo += [f for f, _ in node.next_functions if f is not None]
    return any("deco_kernels::pool" in name for name in names)


def lora(module, name):
    module.set_submodule(name, LoraLinear(module.get_submodule(name)))


def hook(module, name):
    module.get_submodule(name).register_forward_hook(lambda m, a, y: 2 * y)


def pre_hook(module, name):
    module.get_submodule(name).register_forward_pre_hook(lambda m, a: (2 * a[0],))


def override(module, name):
    layer = module.get_submodule(name)
    layer.forward = lambda x: nn.Linear.forward(layer, 2 * x)


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def parametrise(module, name):
    parametrize.register_parametrization(module.get_submodule(name), "weight", Doubled())


CHANGES = [lora, hook, pre_hook, override, parametrise]
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
