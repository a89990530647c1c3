"""Are the kernels right? The whole projector in the interpreter, as compiled PTX, or on a GPU."""

import os
import re
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import triton
from cuda_machines import on_host, on_ptx, require_compilers
from machines import Tf32Linear, simulated

from deco_kernels import (
    AvgPoolProjector,
    FusedAvgPoolProjector,
    Stencil,
    act_linear,
    backends,
    pool,
    pool_linear,
)
from deco_kernels.backends import eager
from deco_kernels.check import Case, case_errors, errors, float32_matmul

# Ragged rows, features and channels; three or more steps of the pipelined loops.
CASES = {
    "overlapping": Case(15, 7, 9, 200, 136, layer_num=2, strided=True),
    "regular": Case(4, 12, 36, 192, 128, layer_num=2),
    "unaligned": Case(3, 6, 4, 67, 45, layer_num=1),
    "upsampling": Case(2, 3, 25, 72, 80, layer_num=3, strided=True),
    "global": Case(3, 9, 1, 136, 64, layer_num=2),
}
MACHINES = [
    ("triton", "interpreter"),
    ("triton", "sm80"),
    pytest.param(("triton", "sm90"), marks=pytest.mark.slow),  # tests/test_races.py has it too
    pytest.param(("triton", "gpu"), marks=pytest.mark.gpu),
    ("composed", "interpreter"),
    pytest.param(("composed", "sm80"), marks=pytest.mark.slow),
    pytest.param(("composed", "gpu"), marks=pytest.mark.gpu),
    ("cuda", "host"),
    ("cuda", "sm80"),
    pytest.param(("cuda", "sm75"), marks=pytest.mark.slow),
    pytest.param(("cuda", "sm90"), marks=pytest.mark.slow),  # nvcc's PTX differs little
    pytest.param(("cuda", "gpu"), marks=pytest.mark.gpu),
]
INTERPRETING = triton.knobs.runtime.interpret


@dataclass
class Machine:
    """Where kernels run; ``context`` yields the statistics of what is launched in it."""

    backend: str
    name: str

    @property
    def device(self):
        return "cuda:0" if self.name == "gpu" else "cpu"

    def context(self):
        if self.name in ("interpreter", "gpu"):
            return nullcontext([])
        if self.name == "host":
            return on_host(seed=3, resident=2)
        run = on_ptx if self.backend == "cuda" else simulated
        return run(int(self.name[2:]))


@pytest.fixture(params=MACHINES, ids=lambda machine: "-".join(machine))
def machine(request):
    backend, name = request.param
    if (name == "interpreter") != INTERPRETING:
        pytest.skip("Triton decides on import: see test_the_interpreter_agrees")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if name == "gpu" and backend == "cuda":
        reason = backends.unusable("cuda", torch.device("cuda:0"), torch.float16)
        if reason:
            pytest.skip(reason)
    if backend == "cuda" and name != "gpu":
        require_compilers(ptx=name != "host")
    return Machine(backend, name)


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
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 22


def skip_if_seen(machine, case):
    """Machines whose kernels differ little from others show two cases."""
    alike = machine.name == "sm90" or (machine.backend, machine.name) == ("composed", "sm80")
    if alike and case not in (CASES["overlapping"], CASES["global"]):
        pytest.skip("seen on sm80")


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_16_bit_error_is_at_most_eager(machine, dtype, case):
    only_fp16 = machine.name in ("interpreter", "sm75")
    if only_fp16 and dtype == torch.bfloat16:
        pytest.skip("the interpreter computes bfloat16 wrongly; Turing has none")
    if (
        not only_fp16
        and machine.name != "gpu"
        and dtype == torch.float16
        and case not in (CASES["overlapping"], CASES["unaligned"])
    ):
        pytest.skip("two cases show the two instructions that are others than in bfloat16")
    skip_if_seen(machine, case)
    with machine.context() as launches:
        found = case_errors(case, dtype, torch.device(machine.device), machine.backend, seed=1)
    assert all(e.within() for e in found), found
    assert not [race for stats in launches for race in stats.races]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tf32_error_is_at_most_that_of_tf32_products(machine, case):
    skip_if_seen(machine, case)
    device = machine.device
    batch, side, query_num, channels, features, layers, strided = case
    torch.manual_seed(2)
    oracle = AvgPoolProjector(layers, query_num, channels, features).to(device)
    fused = FusedAvgPoolProjector(layers, query_num, channels, features, backend=machine.backend)
    fused = fused.to(device)
    fused.load_state_dict(oracle.state_dict())
    if device == "cpu":
        # Triton leaves it to the tensor cores to cut the low bits off; CUDA C++ rounds them.
        Tf32Linear.replace_in(oracle)
    x = torch.randn(batch, side**2 + strided, channels, device=device)[:, int(strided) :]
    dy = torch.randn(batch, query_num, features, device=device)
    with float32_matmul("tf32"), machine.context() as launches:
        found = errors(fused, oracle, x, dy)
    # Which way a chip rounds to TF32 is its own affair, so the two errors are alike, not ordered.
    assert all(e.within(1.5) for e in found), found
    assert not [race for stats in launches for race in stats.races]


def test_ieee_float32_pools_here_and_multiplies_in_torch(machine):
    place = torch.device(machine.device)
    with float32_matmul("ieee"), machine.context() as launches:
        found = case_errors(CASES["overlapping"], torch.float32, place, machine.backend)
    assert all(e.within() for e in found), found
    elementwise = {"pool", "dgelu"}
    if machine.backend != "cuda":
        elementwise = {"pool_kernel", "dgelu_kernel", "bias_grad_kernel"}
    assert {stats.kernel for stats in launches} <= elementwise


def test_a_strided_bias(machine):
    stencil = Stencil.adaptive((4, 4), (2, 2))
    x, w = torch.randn(2, 16, 64), torch.randn(16, 64)
    for bias in (torch.randn(32)[::2], torch.randn(1).expand(16)):
        args = [t.to(machine.device, torch.float16) for t in (x, w)]
        bias = bias.to(torch.float16).to(machine.device)
        with machine.context():
            y = pool_linear(*args, bias, stencil, backend=machine.backend)
        same = pool_linear(*args, bias, stencil, backend="eager")
        torch.testing.assert_close(y, same, rtol=4e-3, atol=4e-3)


def test_backward_under_an_autocast_that_the_forward_did_not_have(machine):
    stencil = Stencil.adaptive((4, 4), (2, 2))
    x, w, v = torch.randn(2, 16, 24), torch.randn(40, 24), torch.randn(16, 40)
    x, w, v = (t.to(machine.device).requires_grad_() for t in (x, w, v))
    kind = machine.device.partition(":")[0]
    with machine.context():
        hidden = pool_linear(x, w, None, stencil, "gelu", backend=machine.backend)
        y = act_linear(hidden, v, None, backend=machine.backend)
        with torch.autocast(kind, torch.bfloat16):
            found = torch.autograd.grad(y.sum(), [x, w, v])
    p = torch.nn.functional.adaptive_avg_pool2d(x.mT.unflatten(2, (4, 4)), (2, 2)).flatten(2).mT
    y = torch.nn.functional.gelu(p @ w.T) @ v.T
    for ours, want in zip(found, torch.autograd.grad(y.sum(), [x, w, v]), strict=True):
        torch.testing.assert_close(ours, want, rtol=0.1, atol=0.1)


def test_tokens_of_another_dtype_than_the_weights(machine):
    """As under autocast: float32 tokens, 16-bit weights, and the tokens' gradient in float32."""
    stencil = Stencil.adaptive((4, 4), (3, 3))
    w, x = torch.randn(72, 24).half(), torch.randn(3, 16, 24)
    w, x = (t.to(machine.device).requires_grad_() for t in (w, x))
    dy = torch.randn(3, 9, 72, device=machine.device).half()
    with machine.context(), torch.autocast(machine.device.partition(":")[0], torch.float16):
        y = pool_linear(x, w, None, stencil, backend=machine.backend)
        dx, dw = torch.autograd.grad(y, [x, w], dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.float16, torch.float32, torch.float16)
    x, w, dy = (t.detach().double().cpu() for t in (x, w, dy))
    rows, columns = (t.to("cpu", torch.float64) for t in stencil.tables())
    p = eager.pool(x, rows._replace(geometry=""), torch.float64)
    torch.testing.assert_close(y.double().cpu(), p @ w.T, rtol=4e-3, atol=4e-3)
    want = eager.pool(dy @ w, columns, torch.float64)
    torch.testing.assert_close(dx.double().cpu(), want, rtol=4e-3, atol=1e-2)


def test_packs_and_tokens_that_nobody_reads(machine):
    """Wide padding, and rows without any weight: NaN may stand where nobody reads."""
    pack = Stencil.packed([(7, 5), (2, 3)], target=(2, 2), passthrough=1)
    stencil = Stencil.concat([pack, Stencil.bilinear((9, 6), (3, 2))])
    matrix = torch.zeros(stencil.n_out, stencil.n_in, dtype=torch.double)
    rows, _ = stencil.tables()
    matrix.scatter_add_(1, rows.index.long(), rows.weight)
    read = matrix.any(0)
    assert not read.all()
    x, dp = torch.randn(2, stencil.n_in, 24), torch.randn(2, stencil.n_out, 24)
    poisoned = x.masked_fill(~read[:, None], torch.nan).to(machine.device).requires_grad_()
    with machine.context():
        p = pool(poisoned, stencil, backend=machine.backend)
        (dx,) = torch.autograd.grad(p, poisoned, dp.to(machine.device))
    assert (dx[:, ~read] == 0).all()
    want = matrix @ x.double().masked_fill(~read[:, None], 0)
    torch.testing.assert_close(p.cpu().double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx.cpu().double(), matrix.T @ dp.double(), rtol=1e-5, atol=1e-6)
