"""How fast are fused projectors beside the stock ones? Ratios of the two, run alternately.

    pytest benchmarks/test_fuse.py --benchmark-only --benchmark-json out.json

`extra_info` in the file carries the stock module's time over ours, forward or a full step with a
trained tower, and our output's error over the stock one's, root mean square against float64; the
printed table's times are of the fused module alone.
"""

import copy
import statistics

import pytest
import torch
from stock import LlavaLike, PerceptionProjector, PllavaProjector, UnshufflingTower
from timing import beside
from torch import nn
from work import DEVICE

from deco_kernels import fuse
from deco_kernels.tools.measure import saved_bytes


def llava_video() -> nn.Module:
    layers = nn.Linear(1152, 3584), nn.GELU(), nn.Linear(3584, 3584)
    return LlavaLike("bilinear", side=27, projector=nn.Sequential(*layers))


GRIDS = torch.tensor([[1, h, w] for h in range(8, 40, 4) for w in range(8, 40, 4)])  # 64 images
TOKENS = int(GRIDS.prod(1).sum())

CASES = {
    "Perception-LM, 1024 -> 256 tokens": (
        lambda: PerceptionProjector(1536, 4096),
        (1, 1024, 1536),
        lambda module, x: module(x),
    ),
    "PLLaVA, 2 x 576 -> 2 x 144 tokens": (
        lambda: PllavaProjector(1024, 4096, frames=2, grid=(24, 24), to=(2, 12, 12)),
        (2, 576, 1024),
        lambda module, x: module(x, "video", 1, 1),
    ),
    "LLaVA-Video, 2 x 729 -> 2 x 196 tokens": (
        llava_video,
        (2, 729, 1152),
        lambda module, x: module([x], ["video"]),
    ),
    f"VideoLLaMA 3's downsampling, 64 images, {TOKENS} -> {TOKENS // 4} tokens": (
        UnshufflingTower,
        (TOKENS, 1152),
        lambda module, x: module.pixel_unshuffle(x, GRIDS, torch.full((len(GRIDS),), 2)),
    ),
}


def pair(make) -> tuple[nn.Module, nn.Module]:
    """The fused and the stock module, with the same parameters."""
    stock = make().to(DEVICE)
    fused = copy.copy(stock)
    assert fuse(fused).replaced
    return fused, stock


def exact(module: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    return copy.deepcopy(module).double(), x.double()


@pytest.mark.parametrize("step", [False, True], ids=["forward", "step"])
@pytest.mark.parametrize(("make", "shape", "call"), CASES.values(), ids=[*CASES])
def test_against_stock(benchmark, make, shape, call, step):
    fused, stock = pair(make)
    x = torch.randn(shape, device=DEVICE, requires_grad=step)
    leaves = [x, *stock.parameters()]

    def run(module):
        def runs():
            with torch.set_grad_enabled(step):
                y = call(module, x)
            if not step:
                return y
            return torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

        return runs

    pairs = beside(run(fused), run(stock), rounds=6, repeat=1)
    benchmark.extra_info["stock_over_fused"] = statistics.median(b / a for a, b in pairs)
    if not step:
        with torch.no_grad():
            ours, stocks, truth = (
                call(*each) for each in ((fused, x), (stock, x), exact(stock, x))
            )
        errors = [(y - truth).square().mean().sqrt().item() for y in (ours, stocks)]
        benchmark.extra_info["error_over_stock"] = errors[0] / errors[1]
    benchmark.pedantic(run(fused), rounds=3, warmup_rounds=1)


def test_saved_bytes(benchmark):
    """What Perception-LM's projector keeps for backward with a trained tower, one image."""
    make, shape, call = CASES["Perception-LM, 1024 -> 256 tokens"]
    fused, stock = pair(make)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    ours, eager = (
        saved_bytes(lambda module=module: call(module, x), exclude=stock.parameters())
        for module in (fused, stock)
    )
    benchmark.extra_info.update(saved_bytes=ours, saved_bytes_over_stock=ours / eager)
    benchmark.pedantic(lambda: call(fused, x), rounds=1)
