"""How fast is the fused projector beside the oracle? Ratios of the two, run alternately.

    pytest benchmarks/ --benchmark-only --benchmark-json out.json

`extra_info` in the file carries what was measured beside the oracle, in alternation; the printed
table's times are of the fused module alone.
"""

import statistics

import pytest
import torch
from timing import beside
from work import DEVICE

from deco_kernels import AvgPoolProjector, FusedAvgPoolProjector


def pair(*sizes: int) -> tuple[FusedAvgPoolProjector, AvgPoolProjector]:
    oracle = AvgPoolProjector(*sizes).to(DEVICE)
    return FusedAvgPoolProjector.from_reference(oracle), oracle


@pytest.mark.parametrize("query_num", [144, 64])
@pytest.mark.parametrize("trained_tower", [False, True], ids=["frozen", "trained"])
def test_training_step(benchmark, query_num, trained_tower):
    """Forward and backward of one LLaVA-1.5 image: [1, 576, 1024] -> [1, query_num, 4096]."""
    fused, oracle = pair(2, query_num, 1024, 4096)
    x = torch.randn(1, 576, 1024, device=DEVICE, requires_grad=trained_tower)
    dy = torch.randn(1, query_num, 4096, device=DEVICE)
    leaves = [p for p in (x, *oracle.parameters()) if p.requires_grad]

    def step(module):
        return lambda: torch.autograd.grad(module(x), leaves, dy)

    pairs = beside(step(fused), step(oracle), rounds=10, repeat=1)
    benchmark.extra_info["ratio_to_oracle"] = statistics.median(a / b for a, b in pairs)
    benchmark.pedantic(step(fused), rounds=5, warmup_rounds=1)


def test_host_overhead(benchmark):
    """Forward of [1, 16, 64] -> [1, 4, 64]: next to no arithmetic, so the time is the host's."""
    fused, oracle = pair(2, 4, 64, 64)
    x = torch.randn(1, 16, 64, device=DEVICE)
    pairs = beside(lambda: fused(x), lambda: oracle(x), rounds=40, repeat=200)
    benchmark.extra_info["microseconds_over_oracle"] = 1e6 * statistics.median(
        a - b for a, b in pairs
    )
    benchmark.pedantic(lambda: fused(x), rounds=50, iterations=100)
