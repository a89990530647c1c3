"""Are the kernels right? The whole projector in the interpreter, as compiled PTX, or on a GPU."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
import triton
from machines import Tf32Linear, simulated

from deco_kernels import AvgPoolProjector, FusedAvgPoolProjector
from deco_kernels.check import Case, case_errors, errors, float32_matmul

# Ragged rows, features and channels; three or more steps of the pipelined loops.
CASES = {
    "overlapping": Case(15, 7, 9, 200, 136, layer_num=2, strided=True),
    "regular": Case(4, 12, 36, 192, 128, layer_num=2),
    "unaligned": Case(3, 6, 4, 67, 45, layer_num=1),
    "upsampling": Case(2, 3, 25, 72, 80, layer_num=3, strided=True),
    "global": Case(3, 9, 1, 136, 64, layer_num=2),
}
MACHINES = ("interpreter", "sm80", "sm90", "gpu")


INTERPRETING = triton.knobs.runtime.interpret


@pytest.fixture(params=MACHINES)
def machine(request):
    """Where kernels run: its name, the device, and a context manager that yields the launches."""
    name = request.param
    if (name == "interpreter") != INTERPRETING:
        pytest.skip("Triton decides on import: see test_the_interpreter_agrees")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name.startswith("sm"):
        return name, "cpu", simulated(int(name[2:]))
    return name, "cuda:0" if name == "gpu" else "cpu", nullcontext()


@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_the_interpreter_agrees():
    """Wall 1: these tests once more, in a process whose kernels are interpreted."""
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            __file__,
            "-k",
            "interpreter",
            "-p",
            "no:cacheprovider",
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 11


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_error_is_at_most_eager(machine, dtype, case):
    name, device, context = machine
    if name == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly")
    with context as launches:
        found = case_errors(case, dtype, torch.device(device), "triton", seed=1)
    assert all(e.within() for e in found), found
    assert not [race for stats in launches or () for race in stats.races]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tf32_error_is_at_most_that_of_tf32_products(machine, case):
    _, device, context = machine
    batch, side, query_num, channels, features, layers, strided = case
    torch.manual_seed(2)
    oracle = AvgPoolProjector(layers, query_num, channels, features).to(device)
    fused = FusedAvgPoolProjector(layers, query_num, channels, features, backend="triton").to(
        device
    )
    fused.load_state_dict(oracle.state_dict())
    if device == "cpu":
        Tf32Linear.replace_in(oracle)
    x = torch.randn(batch, side**2 + strided, channels, device=device)[:, int(strided) :]
    dy = torch.randn(batch, query_num, features, device=device)
    with float32_matmul("tf32"), context as launches:
        found = errors(fused, oracle, x, dy)
    # Which way a chip rounds to TF32 is its own affair, so the two errors are alike, not ordered.
    assert all(e.within(1.5) for e in found), found
    assert not [race for stats in launches or () for race in stats.races]


def test_ieee_float32_pools_here_and_multiplies_in_torch(machine):
    _, device, context = machine
    with float32_matmul("ieee"), context as launches:
        found = case_errors(CASES["overlapping"], torch.float32, torch.device(device), "triton")
    assert all(e.within() for e in found), found
    assert {stats.kernel for stats in launches or ()} <= {"pool_kernel"}
