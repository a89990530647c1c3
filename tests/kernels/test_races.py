"""Do the CTAs of the dataflow kernels wait for each other? Random schedules, and mutants."""

from contextlib import contextmanager

import pytest
import torch
import triton
from machines.cuda import host_kernels, mutant, on_host, on_ptx, ptx, require_compilers
from machines.triton import Copy, require_products, simulated, version
from ptxsim import SimError

from deco_kernels import Stencil, backends
from deco_kernels.backends import cuda
from deco_kernels.backends import triton as triton_backend
from deco_kernels.kernels import pool_linear
from deco_kernels.kernels.launch import Config

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels")

# What each has in place of the text of pool_linear.py
TRITON_MUTANTS = {
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
# and of pool_linear.cu
CUDA_MUTANTS = {
    "flag wait removed": {"< SLOTS) __nanosleep": "< 0) __nanosleep"},
    "wait for all but one": {"< SLOTS) __nanosleep": "< SLOTS - 1) __nanosleep"},
    "release made relaxed": {"red_release_add(flags + panel, 1)": "atomicAdd(flags + panel, 1)"},
    "acquire made relaxed": {"ld_acquire(flags + panel)": "atomicAdd(flags + panel, 0)"},
    "barrier before the flag removed": {"__syncthreads();  // all rows": "//"},
    "barrier after the wait removed": {"__syncthreads();  // the panel": "//"},
    "barrier between stages removed": {"__syncthreads();  // this stage": "//"},
    "copies not waited for": {"wait<STAGES - 2>": "wait<STAGES - 1>"},
    "row mask off by one": {"r < rows &&": "r <= rows &&"},
    "workspace not reset": {"(int)gridDim.x - 1": "-1"},
    "reset too early": {"(int)gridDim.x - 1": "(int)gridDim.x - 2"},
    "ticket overwritten": {"finished = drawn + 1;": "finished = drawn;"},
}
UNSEEN_ON_HOST = {  # accesses happen in program order there, and nobody checks bounds
    "release made relaxed",
    "acquire made relaxed",
    "row mask off by one",
}


def run_twice(backend: str, dtype: torch.dtype) -> None:
    """pool_linear on three panels, one ragged; twice, so that the workspace is used again."""
    x = torch.randn(15 if backend == "triton" else 30, 36, 72).to(dtype)
    w, bias = torch.randn(72, 72).to(dtype), torch.randn(72).to(dtype)
    rows, _ = Stencil.adaptive((6, 6), (3, 3)).tables("cpu", torch.float32)
    for _ in range(2):
        p, z, g = backends.get(backend).pool_linear(x, rows, w, bias, "gelu", True)
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
def workspace(monkeypatch):
    """As on a GPU: later launches get the workspace as the ones before have left it.

    Small Triton tiles: many tasks for little arithmetic. Where it counts, test_kernels runs
    shipped ones.
    """
    tiles = Config({"PM": 16, "PK": 64, "BM": 64, "BN": 64, "BK": 32}, num_warps=4, num_stages=3)
    monkeypatch.setattr(triton_backend, "config_for", lambda *_: tiles)
    kept = torch.zeros(64, dtype=torch.int32)
    for user in (pool_linear, cuda):
        monkeypatch.setattr(user, "workspace_for", lambda device, size: kept)
    return kept


@contextmanager
def interleaved(backend, machine, resident, seed, mutated=None):
    """Blocks of launches in it run in turns; yields the launches' statistics."""
    if machine == "host":
        with on_host(seed, resident, host_kernels(mutated) if mutated else None) as launches:
            yield launches
        return
    how = {"schedule": "interleaved", "resident": resident, "seed": seed}
    arch = int(machine[2:])
    if backend == "triton":
        run = simulated(arch, mutated, **how)
    else:
        run = on_ptx(arch, *[mutated] * bool(mutated), **how)
    with run as launches:
        yield launches


def check_schedule(workspace, backend, machine, resident, dtype, seed):
    with interleaved(backend, machine, resident, seed) as launches:
        run_twice(backend, dtype)
    assert len(launches) == (0 if machine == "host" else 2)
    assert not [race for stats in launches for race in stats.races]
    assert workspace.count_nonzero() == 0


PLACES = [("triton", "sm80"), ("triton", "sm90"), ("cuda", "sm80"), ("cuda", "host")]


@pytest.fixture
def place(request):
    backend, machine = request.param
    if backend == "cuda":
        require_compilers(ptx=machine != "host")
    else:
        require_products(int(machine[2:]))
    return request.param


@pytest.mark.parametrize("place", PLACES, ids="-".join, indirect=True)
@pytest.mark.parametrize("resident", [1, 2, pytest.param(3, marks=pytest.mark.slow), 4])
def test_any_schedule_is_right_and_free_of_races(workspace, place, resident):
    dtype = torch.float16 if resident == 3 else torch.bfloat16
    check_schedule(workspace, *place, resident, dtype, seed=resident)


@pytest.mark.slow
@pytest.mark.parametrize("place", [*PLACES, ("cuda", "sm90")], ids="-".join, indirect=True)
@pytest.mark.parametrize("seed", range(1, 7))
def test_schedules_of_the_mutants(workspace, place, seed):
    """Where mutants are caught, the original is not."""
    check_schedule(workspace, *place, 4, torch.bfloat16, seed)


def test_lockstep_is_right_too(workspace):
    with simulated(80) as launches:
        run_twice("triton", torch.bfloat16)
    assert not [race for stats in launches for race in stats.races]


def assert_caught(workspace, backend, machine, mutated):
    caught = []
    for seed in range(1, 7):
        workspace.zero_()
        try:
            with interleaved(backend, machine, 4, seed, mutated) as launches:
                run_twice(backend, torch.bfloat16)
        except (SimError, AssertionError, RuntimeError) as error:
            caught.append(error)
        caught += [race for stats in launches for race in stats.races]
        if caught:
            break
    assert caught


# A missing order, a missing barrier, and of CUDA a real mistake of an early version.
QUICK = (
    "release made relaxed",
    "barrier removed",
    "barrier before the flag removed",
    "ticket overwritten",
)


def skip_but_quick(second, name):
    """A second machine has to see some mutants, not all: each takes ten seconds."""
    if second and name not in QUICK:
        pytest.skip("seen on sm80")


def mutants(names):
    """One in plain runs: the barrier that a kernel has between its pooling and its flag."""
    plain = "barrier removed", "barrier before the flag removed"
    return [pytest.param(n, marks=() if n in plain else pytest.mark.slow) for n in names]


@pytest.mark.parametrize("name", mutants(TRITON_MUTANTS))
@pytest.mark.parametrize("machine", ["sm80", pytest.param("sm90", marks=pytest.mark.slow)])
def test_mutants_in_triton_are_caught(workspace, tmp_path, machine, name):
    skip_but_quick(machine == "sm90", name)
    if name == "barrier removed" and version(triton) >= (3, 9):
        pytest.skip("Triton from 3.9 puts a barrier before every release itself")
    require_products(int(machine[2:]))
    copy = Copy(tmp_path, "pool_linear.py", TRITON_MUTANTS[name])
    assert_caught(workspace, "triton", machine, copy)


@pytest.mark.parametrize("machine", ["sm80", pytest.param("host", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", mutants(CUDA_MUTANTS))
def test_mutants_in_cuda_are_caught(workspace, tmp_path, machine, name):
    skip_but_quick(machine == "host", name)
    if machine == "host" and name in UNSEEN_ON_HOST:
        pytest.skip("the PTX simulator sees it")
    require_compilers(ptx=machine != "host")
    csrc = mutant(tmp_path, "pool_linear.cu", CUDA_MUTANTS[name])
    host_kernels(csrc) if machine == "host" else ptx(80, csrc)  # that they compile is no catch
    assert_caught(workspace, "cuda", machine, csrc)
