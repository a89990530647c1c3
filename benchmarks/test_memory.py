"""What does every way to project keep for backward? Exact bytes, beside the oracle's.

In bfloat16, one image or clip. The printed times are those of one forward while bytes are counted.
"""

import pytest
import torch
from cases import MODES, SHAPES
from providers import PROVIDERS, cannot, describe
from roofline import device_name, versions
from work import DEVICE, DTYPE, work

from deco_kernels.measure import saved_bytes

KEPT = torch.bfloat16 if DEVICE.type == "cpu" else DTYPE

STEPS = [mode for mode in MODES if mode.what == "step"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", STEPS, ids=str)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.batch == 1], ids=str)
def test_saved_bytes(benchmark, shape, mode, provider):
    reason = cannot(provider, shape, mode)
    if reason:
        pytest.skip(f"{provider}: {reason}")
    oracle, x, _ = work(shape, KEPT)
    x = x.detach().requires_grad_(mode.trained_tower)

    def kept(module):
        return saved_bytes(lambda: module(x), exclude=oracle.parameters())

    benchmark.group = f"{shape} {mode}, bytes kept"
    found = benchmark.pedantic(kept, args=(PROVIDERS[provider](oracle, shape),), rounds=1)
    benchmark.extra_info.update(
        what=describe(provider),
        shape=shape.describe(),
        dtype=str(KEPT),
        device=device_name(),
        versions=versions(),
        saved_bytes=found,
        eager_saved_bytes=kept(oracle),
    )
