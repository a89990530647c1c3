"""Is a projector that pools after its MLP computed right with the pool moved before the product?"""

import pytest
import torch
import torch.nn.functional as F
from numeric import Function, numeric, seeds, wrong

from deco_kernels import Stencil, act_pool_linear
from deco_kernels.functional import TOKEN_ACTIVATIONS
from deco_kernels.tools import check
from deco_kernels.tools.check import Error, over
from deco_kernels.tools.check.bounds import Chain, averages
from deco_kernels.tools.measure import float32_matmul, saved_bytes

GRIDS = {"regular": ((4, 6), (2, 3)), "overlapping": ((5, 7), (3, 4)), "global": ((9, 3), (1, 1))}
ACTS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
}


def stock(x, weight, bias, grids, activation):
    """As models have it: activate, project, pool."""
    y = F.linear(ACTS[activation](x), weight, bias)
    y = y.mT.unflatten(2, grids[0])
    return F.adaptive_avg_pool2d(y, grids[1]).flatten(2).mT


def errors(dtype, grids, activation, backend, draws, device="cpu", **sizes) -> list[Error]:
    """The errors of several draws together."""
    stencil = Stencil.adaptive(*grids)
    functions = (
        lambda *t: act_pool_linear(*t, stencil, activation, backend=backend),
        lambda *t: stock(*t, grids, activation),
    )
    found = []
    for _ in draws:
        (x, weight, bias), dy = tensors(dtype, grids, device=device, **sizes)
        both = (Function(f, weight=weight, bias=bias) for f in functions)
        chain = Chain(averages(*grids), [(weight, bias)], ACTS[activation])
        found.append(check.errors(*both, x, dy, chain))
    return over(found)


def tensors(dtype, grids, batch=2, channels=72, features=40, device="cpu", weights=None):
    n_in, n_out = (grid[0] * grid[1] for grid in grids)
    x = 2 * torch.randn(batch, n_in + 1, channels, device=device)
    made = x, torch.randn(features, channels, device=device), torch.randn(features, device=device)
    x, w, bias = made[0].to(dtype), *(t.to(weights or dtype) for t in made[1:])
    dy = torch.randn(batch, n_out, features, device=device).to(weights or dtype)
    return (x[:, 1:], w, bias), dy


def slack(dtype):
    """What the error may be, in stock's.

    Averaging T outputs averages the rounding errors of T products, too; a product of averaged
    tokens has one error, of sums that are smaller where tokens differ, but not where they agree.
    So in float32 it is up to sqrt(T) times as large; 1.4 times is the most that was measured, in
    windows of 4. In 16 bits the roundings of what is stored matter more, and we have fewer.
    """
    return 1.5 if dtype == torch.float32 else check.SLACK


@numeric
@pytest.mark.parametrize("activation", [None, *TOKEN_ACTIVATIONS])
@pytest.mark.parametrize("grids", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_on_the_cpu_is_about_that_of_stock(dtype, grids, activation):
    found = errors(dtype, grids, activation, "eager", seeds())
    assert not wrong(found, slack(dtype))


@numeric
@pytest.mark.parametrize(
    ("dtype", "activation", "grids"),
    [
        (torch.bfloat16, "gelu", "regular"),
        (torch.float16, "silu", "overlapping"),
        pytest.param(torch.bfloat16, "gelu_tanh", "overlapping", marks=pytest.mark.slow),
        pytest.param(torch.float16, "quick_gelu", "global", marks=pytest.mark.slow),
    ],
)
def test_16_bit_error_is_that_of_stock(machine, dtype, activation, grids):
    if dtype == torch.bfloat16 and machine.name in ("interpreter", "sm75"):
        pytest.skip("no bfloat16 there")
    machine.skip_without(dtype)
    how = machine.backend, machine.seeds, machine.device
    with machine.context() as launches:
        found = errors(dtype, GRIDS[grids], activation, *how)
    assert not wrong(found, slack(dtype))
    assert not [race for stats in launches for race in stats.races]


@numeric
@pytest.mark.slow
def test_a_window_of_a_whole_image(machine):
    """576 tokens to one: the longest loop of a gather, and a backward of one term."""
    if machine.name in ("sm75", "sm90"):
        pytest.skip("seen on sm80")
    grids, sizes = ((24, 24), (1, 1)), {"batch": 1, "channels": 16, "features": 16}
    how = machine.backend, machine.seeds, machine.device
    with machine.context() as launches:
        found = errors(torch.float16, grids, "gelu", *how, **sizes)
    assert not wrong(found, slack(torch.float16))
    assert not [race for stats in launches for race in stats.races]


@numeric
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_float32_error_is_about_that_of_stock(machine, activation):
    grids = GRIDS["overlapping"]
    how = machine.backend, machine.seeds, machine.device
    with float32_matmul("ieee"), machine.context() as launches:
        found = errors(torch.float32, grids, activation, *how, channels=37)
    assert not wrong(found, slack(torch.float32))
    assert not [race for stats in launches for race in stats.races]


@numeric
def test_tokens_of_another_dtype_than_the_weights(machine):
    """As under autocast: pre-activations and their gradient in float32, 16-bit weights."""
    kind = machine.device.partition(":")[0]
    how = machine.backend, machine.seeds, machine.device
    with machine.context(), torch.autocast(kind, torch.float16):
        found = errors(torch.float32, GRIDS["overlapping"], "silu", *how, weights=torch.float16)
    assert not wrong(found, slack(torch.float16))


def test_far_out_pre_activations(machine):
    """Where sigmoids and exponentials overflow, values and slopes do not."""
    x = torch.tensor([0.0, -0.0, 1.0, -3e4, 3e4, -200.0, 200.0, -9.0], device=machine.device)
    x = x.expand(1, 4, 8).contiguous()
    w, dy = torch.eye(8, device=machine.device), torch.ones(1, 1, 8, device=machine.device)
    for activation in TOKEN_ACTIVATIONS:
        leaf = x.clone().requires_grad_()
        stencil = Stencil.adaptive((2, 2), (1, 1))
        with float32_matmul("ieee"), machine.context():
            y = act_pool_linear(leaf, w, None, stencil, activation, backend=machine.backend)
            (dx,) = torch.autograd.grad(y, leaf, dy)
        wide = x[:, :1].double().requires_grad_()
        want = ACTS[activation](wide)
        (slope,) = torch.autograd.grad(want.sum(), wide)
        torch.testing.assert_close(y.double(), want.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dx.double()[:, :1], slope / 4, rtol=1e-5, atol=1e-5)


def test_keeps_pre_activations_and_pooled_tokens_only():
    (x, w, bias), _ = tensors(torch.float32, GRIDS["regular"])
    x = x.contiguous().requires_grad_()
    stencil = Stencil.adaptive(*GRIDS["regular"])
    parameters = [t.requires_grad_() for t in (w, bias)]

    def kept():
        return saved_bytes(lambda: act_pool_linear(x, w, bias, stencil), exclude=parameters)

    assert kept() == 4 * (x.numel() + 2 * 6 * 72)
    x.requires_grad_(False)
    assert kept() == 4 * 2 * 6 * 72


def test_no_images():
    x, w = torch.randn(0, 24, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    y = act_pool_linear(x, w, None, Stencil.adaptive((4, 6), (2, 3)))
    dx, dw = torch.autograd.grad(y.sum(), [x, w])
    assert (y.shape, dx.shape) == ((0, 6, 4), (0, 24, 8))
    assert torch.equal(dw, torch.zeros_like(w))


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_without_graph_breaks(dynamic):
    torch.compiler.reset()
    (x, w, bias), _ = tensors(torch.float32, GRIDS["overlapping"])
    stencil = Stencil.adaptive(*GRIDS["overlapping"])
    how = {"fullgraph": True, "dynamic": dynamic, "backend": "aot_eager"}
    compiled = torch.compile(act_pool_linear, **how)
    for activation in TOKEN_ACTIVATIONS:
        runs = []
        for compute in (compiled, act_pool_linear):
            leaves = [t.detach().requires_grad_() for t in (x, w, bias)]
            y = compute(*leaves, stencil, activation)
            runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
        torch.testing.assert_close(*runs)


def test_bad_activation():
    (x, w, bias), _ = tensors(torch.float32, GRIDS["regular"])
    with pytest.raises(ValueError, match=r"must be None or one of 'gelu', .*got 'relu'"):
        act_pool_linear(x, w, bias, Stencil.adaptive(*GRIDS["regular"]), "relu")
