"""Are the kernels right? The whole projector in the interpreter, as compiled PTX, or on a GPU."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from machines.triton import INTERPRETING, Tf32Linear, interpreted
from numeric import CASES, Function, numeric, wrong

from deco_kernels import Stencil, act_linear, pool, pool_linear
from deco_kernels.tools.check import (
    SLACK,
    TF32_SLACK,
    case_errors,
    draw,
    error,
    errors,
    over,
    step,
)
from deco_kernels.tools.check.bounds import Chain, averages, bounds
from deco_kernels.tools.measure import float32_matmul


@numeric
@pytest.mark.skipif(INTERPRETING, reason="this is the interpreter")
def test_the_interpreter_agrees():
    run = interpreted(__file__, "-q", "-k", "interpreter")
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 22


def skip_if_seen(machine, case):
    """Machines whose kernels differ little from others show two cases."""
    alike = machine.name == "sm90" or (machine.backend, machine.name) == ("composed", "sm80")
    if alike and case not in (CASES["overlapping"], CASES["global"]):
        pytest.skip("seen on sm80")


@numeric
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
    machine.skip_without(dtype)
    skip_if_seen(machine, case)
    place = torch.device(machine.device)
    with machine.context() as launches:
        found = case_errors(case, dtype, place, machine.backend, machine.seeds)
    assert not wrong(found)
    assert not [race for stats in launches for race in stats.races]


@numeric
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_tf32_error_is_at_most_that_of_tf32_products(machine, case):
    skip_if_seen(machine, case)
    found = []
    with float32_matmul("tf32"), machine.context() as launches:
        for seed in machine.seeds:
            made = draw(case, torch.float32, torch.device(machine.device), machine.backend, seed)
            if machine.device == "cpu":
                # Triton leaves it to the tensor cores to cut low bits off; CUDA C++ rounds them.
                Tf32Linear.replace_in(made.oracle)
            found.append(errors(*made))
    assert not wrong(over(found), TF32_SLACK if machine.name == "gpu" else SLACK)
    assert not [race for stats in launches for race in stats.races]


@numeric
@pytest.mark.parametrize("name", ["overlapping", "global"])
def test_ieee_float32_pools_here_and_multiplies_in_torch(machine, name):
    place = torch.device(machine.device)
    with float32_matmul("ieee"), machine.context() as launches:
        found = case_errors(CASES[name], torch.float32, place, machine.backend, machine.seeds)
    assert not wrong(found)
    elementwise = {"pool", "dgelu"}
    if machine.backend != "cuda":
        elementwise = {"pool_kernel", "dgelu_kernel", "bias_grad_kernel"}
    assert {stats.kernel for stats in launches} <= elementwise


def stock(grids):
    """Torch's own pooling, a linear layer and, if there is another weight, GELU and that."""

    def compute(x, weight, bias=None, then=None):
        p = F.adaptive_avg_pool2d(x.mT.unflatten(2, grids[0]), grids[1]).flatten(2).mT
        y = F.linear(p, weight, bias)
        return y if then is None else F.linear(F.gelu(y), then)

    return compute


def random(machine, *shape, dtype=torch.float32):
    return torch.randn(shape).to(machine.device, dtype)


@numeric
@pytest.mark.parametrize("kind", ["every second", "one for all"])
def test_a_strided_bias(machine, kind):
    grids, found = ((4, 4), (2, 2)), []

    def ours(x, weight, bias):
        assert bias.stride() != (1,)
        return pool_linear(x, weight, bias, Stencil.adaptive(*grids), backend=machine.backend)

    for _ in machine.seeds:
        x, weight, bias, dy = (
            random(machine, *shape, dtype=torch.float16)
            for shape in ((2, 16, 64), (16, 64), (32,), (2, 4, 16))
        )
        bias = bias[::2] if kind == "every second" else bias[:1].expand(16)
        both = (Function(f, weight=weight, bias=bias) for f in (ours, stock(grids)))
        with machine.context():
            found.append(errors(*both, x, dy, Chain(averages(*grids), [(weight, bias)])))
    assert not wrong(over(found))


@numeric
def test_backward_under_an_autocast_that_the_forward_did_not_have(machine):
    """Its error is at most that of all of it in bfloat16, which holds the numbers exactly."""
    grids, found = ((4, 4), (2, 2)), []
    kind = machine.device.partition(":")[0]
    for _ in machine.seeds:
        x, weight, then = (
            random(machine, *shape, dtype=torch.bfloat16)
            for shape in ((2, 16, 24), (40, 24), (16, 40))
        )
        stocks = Function(lambda x, w, v: stock(grids)(x, w, None, v), weight=weight, then=then)
        dy = random(machine, 2, 4, 16, dtype=torch.bfloat16)
        eager = step(stocks, x, dy)
        truth = step(copy.deepcopy(stocks).double(), x.double(), dy.double())
        leaves = [t.float().requires_grad_() for t in (x, weight, then)]
        with machine.context():
            stencil, backend = Stencil.adaptive(*grids), {"backend": machine.backend}
            hidden = pool_linear(*leaves[:2], None, stencil, "gelu", **backend)
            y = act_linear(hidden, leaves[2], None, **backend)
            with torch.autocast(kind, torch.bfloat16):
                ours = torch.autograd.grad(y, leaves, dy.float())
        names = ["x", "weight", "then"]
        found.append([*map(error, names, ours, eager[1:], truth[1:])])
    assert not wrong(over(found))


@numeric
def test_tokens_of_another_dtype_than_the_weights(machine):
    """As under autocast: float32 tokens, 16-bit weights, and the tokens' gradient in float32."""
    grids, found = ((4, 4), (3, 3)), []

    def ours(x, weight):
        y = pool_linear(x, weight, None, Stencil.adaptive(*grids), backend=machine.backend)
        assert weight.dtype == torch.float64 or y.dtype == torch.float16
        return y

    for _ in machine.seeds:
        x = random(machine, 3, 16, 24)
        weight, dy = (
            random(machine, *shape, dtype=torch.float16) for shape in ((72, 24), (3, 9, 72))
        )
        both = (Function(f, weight=weight) for f in (ours, stock(grids)))
        with machine.context(), torch.autocast(machine.device.partition(":")[0], torch.float16):
            found.append(errors(*both, x, dy, Chain(averages(*grids), [(weight, None)])))
    assert not wrong(over(found))


@numeric
def test_packs_and_tokens_that_nobody_reads(machine):
    """Wide padding, and rows without any weight: NaN may stand where nobody reads."""
    pack = Stencil.packed([(7, 5), (2, 3)], target=(2, 2), passthrough=1)
    stencil = Stencil.concat([pack, Stencil.bilinear((9, 6), (3, 2))])
    matrix = torch.zeros(stencil.n_out, stencil.n_in, dtype=torch.double)
    rows, _ = stencil.tables()
    matrix.scatter_add_(1, rows.index.long(), rows.weight)
    read = matrix.any(0)
    assert not read.all()
    found = []
    for _ in machine.seeds:
        x = random(machine, 2, stencil.n_in, 24).masked_fill(~read[:, None].to(machine.device), 0)
        dp = random(machine, 2, stencil.n_out, 24)
        ours, eager = (
            Function(lambda x, backend=backend: pool(x, stencil, backend=backend))
            for backend in (machine.backend, "eager")
        )
        poisoned = x.masked_fill(~read[:, None].to(machine.device), torch.nan)
        with machine.context():
            ours = step(ours, poisoned, dp)
        assert (ours[1][:, ~read] == 0).all()
        truth = [m.to(machine.device) @ t.double() for m, t in ((matrix, x), (matrix.T, dp))]
        radii = bounds(Chain(matrix, []), x, dp)
        found.append([*map(error, ["p", "x"], ours, step(eager, x, dp), truth, radii)])
    assert not wrong(over(found))
