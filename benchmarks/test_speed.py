"""How fast is every way to project, on real shapes? The oracle's time is taken in alternation.

    pytest benchmarks/ --benchmark-only --benchmark-json out.json

A group of the printed table is one shape and mode; its times are those the host sees. `extra_info`
in the file has the times of the device where that is a GPU, and what follows from them. Nothing is
asserted but that a provider computes what the oracle does, before it is timed.
"""

import statistics

import pytest
from cases import MODES, SHAPES
from providers import PROVIDERS, describe, why_not
from roofline import device_name, rates, versions
from timing import alternately, peak_bytes, pedantic, seconds
from work import DEVICE, DTYPE, check, job, work

from deco_kernels.tools.measure import saved_bytes

# On a CPU `check` is warm-up enough; on a GPU the first calls also record CUDA graphs.
WARMUP, ROUNDS = (0, 3) if DEVICE.type == "cpu" else (3, 20)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_speed(benchmark, shape, mode, provider):
    reason = why_not(provider, shape, mode)
    if reason:
        pytest.skip(f"{provider}: {reason}")
    oracle = work(shape).oracle
    module = PROVIDERS[provider](oracle, shape)
    ours, eager = job(module, shape, mode), job(oracle, shape, mode)
    check(ours, shape, mode)

    pairs = alternately(lambda: seconds(ours), lambda: seconds(eager), WARMUP + ROUNDS)[WARMUP:]
    ours_s, eager_s = map(statistics.median, zip(*pairs, strict=True))
    ratios = [a / b for a, b in pairs]
    benchmark.group = f"{shape} {mode}"
    benchmark.extra_info.update(
        what=describe(provider),
        shape=shape.describe(),
        dtype=str(DTYPE),
        device=device_name(),
        versions=versions(),
        ratio_to_eager=statistics.median(ratios),
        ratio_range=[min(ratios), max(ratios)],
        milliseconds=1e3 * ours_s,
        eager_milliseconds=1e3 * eager_s,
        **rates(shape, mode, ours_s),
        peak_memory_bytes=peak_bytes(ours),
    )
    pedantic(benchmark, ours, ROUNDS)
    if mode.differentiates:
        x = work(shape).x.detach().requires_grad_(mode.trained_tower)
        kept = saved_bytes(lambda: module(x), exclude=oracle.parameters())
        benchmark.extra_info["saved_bytes"] = kept
