"""How fast is a pack of images of many sizes, built and pooled? Beside a loop over the images.

    pytest benchmarks/test_packed.py --benchmark-only --benchmark-json out.json

The printed times are of our own; `extra_info` in the file has the loop's, measured in alternation:
torch's pooling of every image on views of its tokens, or on copies channels first.
"""

import random
import statistics

import pytest
import torch
import torch.nn.functional as F
from roofline import device_name, versions
from timing import alternately, pedantic, seconds
from work import DEVICE, DTYPE, Job

from deco_kernels import Stencil, pool

IMAGES, TARGET, ROUNDS = 64, (12, 12), 15


def sizes(count: int, step: int = 1) -> list[tuple[int, int]]:
    """Different grids from 8x8 to 40x40 tokens, of multiples of ``step``."""
    every = [(h, w) for h in range(8, 41, step) for w in range(8, 41, step)]
    return random.Random(0).sample(every, count)


@pytest.mark.parametrize("how", ["target", "merge"])
@pytest.mark.parametrize("new_sizes", [False, True], ids=["known sizes", "new sizes"])
def test_build(benchmark, how, new_sizes):
    """A pack of 256 images as every step of training brings one: another list of grids.

    On the CPU, with rows and columns. Unless the sizes are known, each was never seen before. As in
    training, the process has had larger tensors and more packs than are kept: only then does glibc
    use freed memory again. Fresh pages would take half of the time.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
    grids = sizes(256, step=2 if how == "merge" else 1)
    order = random.Random(1)
    fresh = iter(range(2, 1000))

    def new_list() -> tuple[tuple, dict]:
        target = (next(fresh), 12) if new_sizes else TARGET
        shuffled = order.sample(grids, len(grids))
        return (shuffled,), {"merge": 2} if how == "merge" else {"target": target}

    if how == "merge" and new_sizes:
        pytest.skip("one size of windows is all there is")
    benchmark.group = "build a pack of 256 images"
    benchmark.extra_info.update(versions=versions())
    benchmark.pedantic(
        Stencil.packed, setup=new_list, rounds=ROUNDS, warmup_rounds=0 if new_sizes else 20
    )


@pytest.mark.parametrize("channels", [1024, 256])
@pytest.mark.parametrize("mode", ["adaptive", "bilinear", "merge"])
@pytest.mark.parametrize("layout", ["views", "copies"])
def test_forward_beside_a_loop(benchmark, layout, mode, channels):
    """To 12 x 12 tokens each, or by 2 x 2 tokens ("merge")."""
    grids = sizes(IMAGES, step=2 if mode == "merge" else 1)
    how = {"merge": 2} if mode == "merge" else {"target": TARGET, "mode": mode}
    stencil = Stencil.packed(grids, **how)
    x = torch.randn(1, stencil.n_in, channels, dtype=DTYPE, device=DEVICE)

    def loop() -> torch.Tensor:
        pooled = []
        for (h, w), tokens in zip(grids, x[0].split([h * w for h, w in grids]), strict=True):
            grid = tokens.view(1, h, w, channels).permute(0, 3, 1, 2)
            grid = grid.contiguous() if layout == "copies" else grid
            if mode == "bilinear":
                p = F.interpolate(grid, size=TARGET, mode="bilinear")
            else:
                p = F.adaptive_avg_pool2d(grid, (h // 2, w // 2) if mode == "merge" else TARGET)
            pooled.append(p.permute(0, 2, 3, 1).reshape(-1, channels))
        return torch.cat(pooled)[None]

    ours, loops = (Job(tuple, run) for run in (lambda: pool(x, stencil), loop))
    torch.testing.assert_close(
        ours(), loops(), rtol=2e-2 if DTYPE.itemsize == 2 else 1e-4, atol=1e-2
    )
    pairs = alternately(lambda: seconds(ours), lambda: seconds(loops), ROUNDS)
    benchmark.group = f"pool {IMAGES} images of different sizes, {mode}, {channels} channels"
    benchmark.extra_info.update(
        tokens=stencil.n_in,
        dtype=str(DTYPE),
        device=device_name(),
        versions=versions(),
        loop_over_ours=statistics.median(b / a for a, b in pairs),
        milliseconds=1e3 * statistics.median(a for a, _ in pairs),
        loop_milliseconds=1e3 * statistics.median(b for _, b in pairs),
    )
    pedantic(benchmark, ours, ROUNDS)
