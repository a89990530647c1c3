"""What does every way to project keep for backward? Exact bytes, beside the oracle's.

In bfloat16, one image or clip; and as many models call it, under autocast with float32 weights and
once an image. The printed times are those of the forwards while bytes are counted.
"""

from contextlib import nullcontext

import pytest
import torch
from cases import MODES, SHAPES
from providers import PROVIDERS, cannot, describe
from roofline import device_name, versions
from work import DEVICE, DTYPE, work

from deco_kernels.tools.measure import saved_bytes

KEPT = torch.bfloat16 if DEVICE.type == "cpu" else DTYPE

STEPS = [mode for mode in MODES if mode.what == "step"]
CALLS = 16  # in a region of autocast


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", STEPS, ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.batch == 1], ids=str)
def test_saved_bytes(benchmark, shape, autocast, mode, provider):
    reason = cannot(provider, shape, mode)
    if autocast and (shape is not SHAPES[0] or not provider.startswith(("eager", "ours"))):
        reason = "autocast is shown at one shape, for eager and ours"
    if reason:
        pytest.skip(f"{provider}: {reason}")
    oracle, x, _ = work(shape, torch.float32 if autocast else KEPT)
    x = x.detach().to(KEPT).requires_grad_(mode.trained_tower)

    def kept(module):
        region = torch.autocast(DEVICE.type, KEPT) if autocast else nullcontext()
        with region:
            return saved_bytes(
                lambda: [module(x) for _ in range(CALLS if autocast else 1)],
                exclude=oracle.parameters(),
            )

    more = f", autocast of float32 weights, {CALLS} calls" if autocast else ""
    benchmark.group = f"{shape}{'-autocast' * autocast} {mode}, bytes kept"
    found = benchmark.pedantic(kept, args=(PROVIDERS[provider](oracle, shape),), rounds=1)
    benchmark.extra_info.update(
        what=describe(provider),
        shape=shape.describe() + more,
        dtype=str(KEPT),
        device=device_name(),
        versions=versions(),
        saved_bytes=found,
        eager_saved_bytes=kept(oracle),
    )
