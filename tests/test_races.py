"""Do the CTAs of the dataflow kernel wait for each other? Random schedules, and mutants."""

import pytest
import torch
import triton
from machines import Copy, simulated
from ptxsim import SimError

from deco_kernels import Stencil
from deco_kernels.backends import triton as backend
from deco_kernels.kernels import pool_linear
from deco_kernels.kernels.launch import Config

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels")

# What each has in place of the text of pool_linear.py
MUTANTS = {
    "flag wait removed": {'sem="acquire") < SLOTS': 'sem="acquire") < 0'},
    "wait for all but one": {'sem="acquire") < SLOTS': 'sem="acquire") < SLOTS - 1'},
    "release made relaxed": {'panel, 1, sem="release")': 'panel, 1, sem="relaxed")'},
    "acquire made relaxed": {'panel, 0, sem="acquire")': 'panel, 0, sem="relaxed")'},
    "barrier removed": {"tl.debug_barrier()": "pass"},
    "row mask off by one": {"mask=rows & (rk": "mask=(rm < M + 1)[:, None] & (rk"},
    "rows wrapped": {"p += rm.to(": "p += (rm % M).to(", "mask=rows & (rk": "mask=(rk"},
    "workspace not reset": {"tl.num_programs(0) - 1:": "-1:"},
    "reset too early": {"== tl.num_programs(0) - 1:": "== tl.num_programs(0) - 2:"},
}


def run_twice(dtype: torch.dtype) -> None:
    """pool_linear on three panels, one ragged; twice, so that the workspace is used again."""
    x = torch.randn(15, 36, 72).to(dtype)
    w, bias = torch.randn(72, 72).to(dtype), torch.randn(72).to(dtype)
    rows, _ = Stencil.adaptive((6, 6), (3, 3)).tables("cpu", torch.float32)
    for _ in range(2):
        p, z, g = backend.pool_linear(x, rows, w, bias, "gelu", True)
    pooled = torch.nn.functional.adaptive_avg_pool2d(
        x.double().transpose(1, 2).unflatten(2, (6, 6)), (3, 3)
    )
    pooled = pooled.flatten(2).transpose(1, 2)
    want = p.double() @ w.double().T + bias.double()
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(p.double(), pooled, **tolerance)
    torch.testing.assert_close(z.double(), want, **tolerance)
    torch.testing.assert_close(g.double(), torch.nn.functional.gelu(want), **tolerance)


@pytest.fixture
def one_workspace(monkeypatch):
    """As on a GPU: later launches get the workspace as the ones before have left it.

    Small tiles: many tasks for little arithmetic. Where it counts, test_kernels runs shipped ones.
    """
    tiles = Config({"PM": 16, "PK": 64, "BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3)
    monkeypatch.setattr(backend, "config_for", lambda kernel, dtype: tiles)
    kept = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(pool_linear, "workspace_for", lambda device, size: kept)
    return kept


def check_schedule(workspace, arch, resident, dtype, seed):
    with simulated(arch, schedule="interleaved", resident=resident, seed=seed) as launches:
        run_twice(dtype)
    assert len(launches) == 2
    assert not [race for stats in launches for race in stats.races]
    assert workspace.count_nonzero() == 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("resident", [1, 2, 3, 4])
def test_any_schedule_is_right_and_free_of_races(one_workspace, arch, resident):
    dtype = torch.float16 if resident == 3 else torch.bfloat16
    check_schedule(one_workspace, arch, resident, dtype, seed=resident)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("seed", range(4))
def test_more_schedules(one_workspace, arch, dtype, seed):
    check_schedule(one_workspace, arch, 2 + seed % 3, dtype, seed=100 + seed)


def test_lockstep_is_right_too(one_workspace):
    with simulated(80) as launches:
        run_twice(torch.bfloat16)
    assert not [race for stats in launches for race in stats.races]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(one_workspace, tmp_path, arch, mutant):
    copy = Copy(tmp_path, "pool_linear.py", MUTANTS[mutant])
    caught = []
    for seed in range(6):
        one_workspace.zero_()
        how = {"schedule": "interleaved", "resident": 4, "seed": seed}
        try:
            with simulated(arch, copy, **how) as launches:
                run_twice(torch.bfloat16)
        except (SimError, AssertionError) as error:
            caught.append(error)
        caught += [race for stats in launches for race in stats.races]
        if caught:
            break
    assert caught
