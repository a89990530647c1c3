"""Is the module a drop-in, and honest about the way it takes?"""

import copy

import pytest
import torch
from numeric import CASES, numeric, seeds, wrong
from stock import Quantised
from torch import nn
from torch.nn.utils import parametrize

from deco_kernels import AvgPoolProjector, FusedAvgPoolProjector
from deco_kernels.tools.check import case_errors
from deco_kernels.tools.measure import saved_bytes


def pair(layer_num=2, query_num=4, channels=8, features=12):
    torch.manual_seed(0)
    oracle = AvgPoolProjector(layer_num, query_num, channels, features)
    return oracle, FusedAvgPoolProjector.from_reference(oracle)


@numeric
@pytest.mark.parametrize("name", ["overlapping", "unaligned", "upsampling"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_error_on_the_cpu_is_at_most_eager(name, dtype):
    found = case_errors(CASES[name], dtype, torch.device("cpu"), "auto", seeds())
    assert not wrong(found)


@pytest.mark.parametrize(
    ("layer_num", "query_num", "expected"),
    [(2, 144, 1_474_560), (2, 64, 655_360), (1, 144, 294_912), (1, 64, 131_072)],
)
@pytest.mark.parametrize("trained_tower", [False, True])
def test_saved_bytes_of_one_image(layer_num, query_num, expected, trained_tower):
    fused = FusedAvgPoolProjector(layer_num, query_num).bfloat16()
    x = torch.randn(1, 576, 1024).bfloat16().requires_grad_(trained_tower)
    assert saved_bytes(lambda: fused(x), exclude=fused.parameters()) == expected


@pytest.mark.parametrize(
    ("layer_num", "query_num", "frozen", "trained"),
    [
        (2, 144, 2_654_208, 3_833_856),
        (2, 64, 1_179_648, 2_359_296),
        (1, 144, 294_912, 1_474_560),
        (1, 64, 131_072, 1_310_720),
    ],
)
def test_saved_bytes_of_eager_are_those_of_the_readme(layer_num, query_num, frozen, trained):
    oracle = AvgPoolProjector(layer_num, query_num).bfloat16()
    x = torch.randn(1, 576, 1024).bfloat16()
    assert saved_bytes(lambda: oracle(x), exclude=oracle.parameters()) == frozen
    x.requires_grad_()
    assert saved_bytes(lambda: oracle(x), exclude=oracle.parameters()) == trained


def test_state_dict_goes_both_ways():
    oracle, _ = pair(3)
    fused = FusedAvgPoolProjector(3, 4, 8, 12)
    assert fused.state_dict().keys() == oracle.state_dict().keys()
    fused.load_state_dict(oracle.state_dict())
    x = torch.randn(2, 16, 8)
    torch.testing.assert_close(fused(x), oracle(x))
    oracle.load_state_dict(FusedAvgPoolProjector(3, 4, 8, 12).state_dict())


def test_from_reference_shares_parameters_and_mode():
    oracle, _ = pair()
    fused = FusedAvgPoolProjector.from_reference(oracle.eval(), backend="eager")
    assert not fused.training
    assert fused.backend == "eager"
    assert isinstance(fused, AvgPoolProjector)
    for a, b in zip(fused.parameters(), oracle.parameters(), strict=True):
        assert a is b
    assert (fused.layer_num, fused.query_num) == (2, 4)
    assert (fused.mm_hidden_size, fused.llm_hidden_size) == (8, 12)


def test_from_reference_takes_a_look_alike():
    class Seed(nn.Module):
        def __init__(self):
            super().__init__()
            self.sampler = nn.AdaptiveAvgPool2d(3)
            self.mlp_projector = nn.Sequential(nn.Linear(8, 12))

    fused = FusedAvgPoolProjector.from_reference(Seed())
    assert fused.explain().path == "fused"
    assert fused(torch.randn(1, 16, 8)).shape == (1, 9, 12)


def test_same_initialisation_as_the_oracle():
    oracle, _ = pair()
    torch.manual_seed(0)
    fused = FusedAvgPoolProjector(2, 4, 8, 12)
    assert all(map(torch.equal, fused.parameters(), oracle.parameters()))


def test_copies_and_pickles():
    _, fused = pair()
    again = copy.deepcopy(fused)
    x = torch.randn(1, 16, 8)
    assert torch.equal(again(x), fused(x))


@pytest.mark.parametrize("grid", [(2, 8), (1, 16), (4, 4)])
@pytest.mark.parametrize("layer_num", [1, 2])
def test_rectangular_grid(grid, layer_num):
    oracle, fused = pair(layer_num)
    x = torch.randn(3, 16, 8)
    pooled = oracle.sampler(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
    want = oracle.mlp_projector(pooled)
    torch.testing.assert_close(fused(x, grid), want)
    fused.mlp_projector[0].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(fused(x, grid), want)
    fused.sampler.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(fused(x, grid), want)


class LoraLinear(nn.Module):
    """As adapters do: wraps a linear layer and offers its weight."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.weight, self.bias = base, base.weight, base.bias
        self.a = nn.Parameter(torch.randn(2, base.in_features))
        self.b = nn.Parameter(torch.randn(base.out_features, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


def wrap(i):
    return lambda m: m.mlp_projector.__setitem__(i, LoraLinear(m.mlp_projector[i]))


def override_forward(m):
    m.mlp_projector[0].forward = lambda x: nn.Linear.forward(m.mlp_projector[0], 2 * x)


CHANGES = {
    "nothing": (lambda m: None, "fused", "the tokens are on the CPU"),
    "lora on the first": (wrap(0), "pooled", r"mlp_projector\[0\] is LoraLinear"),
    "lora on the last": (wrap(2), "pooled", r"mlp_projector\[2\] is LoraLinear"),
    "forward hook": (
        lambda m: m.mlp_projector[0].register_forward_hook(lambda mod, a, y: 2 * y),
        "pooled",
        r"mlp_projector\[0\] is Linear, or hooked",
    ),
    "forward pre-hook": (
        lambda m: m.mlp_projector[2].register_forward_pre_hook(lambda mod, a: (2 * a[0],)),
        "pooled",
        r"mlp_projector\[2\]",
    ),
    "hook on the sequence": (
        lambda m: m.mlp_projector.register_forward_hook(lambda mod, a, y: 2 * y),
        "pooled",
        "mlp_projector was replaced or is hooked",
    ),
    "overridden forward": (override_forward, "pooled", r"mlp_projector\[0\]"),
    "parametrization": (
        lambda m: parametrize.register_parametrization(m.mlp_projector[0], "weight", Doubled()),
        "pooled",
        r"mlp_projector\[0\] is ParametrizedLinear",
    ),
    "tanh gelu": (
        lambda m: m.mlp_projector.__setitem__(1, nn.GELU("tanh")),
        "pooled",
        r"mlp_projector\[1\] is an approximate GELU",
    ),
    "dropout at the end": (
        lambda m: m.mlp_projector.append(nn.Dropout(0.0)),
        "pooled",
        r"mlp_projector\[3\] is Dropout",
    ),
    "sampler hook": (
        lambda m: m.sampler.register_forward_hook(lambda mod, a, y: 2 * y),
        "modules",
        "sampler was changed or is hooked",
    ),
    "max pooling": (
        lambda m: setattr(m, "sampler", nn.AdaptiveMaxPool2d((2, 2))),
        "modules",
        "sampler was changed",
    ),
}


@pytest.mark.parametrize(("change", "path", "reason"), CHANGES.values(), ids=[*CHANGES])
def test_changed_children_are_called_and_it_says_so(change, path, reason):
    oracle, fused = pair()  # they share their children, except for a replaced sampler
    change(oracle)
    fused.sampler = oracle.sampler
    x = torch.randn(2, 16, 8)
    plan = fused.explain(x)
    assert plan.path == path
    assert reason.replace("\\", "") in plan.reason
    assert str(plan) == f"backend eager, path {path}: {plan.reason}"
    torch.testing.assert_close(fused(x), oracle(x))


def test_partitioned_weights_are_not_read():
    _, fused = pair()
    fused.mlp_projector[2].weight.data = torch.empty(0)
    assert fused.explain().path == "pooled"
    assert fused.explain().reason == "mlp_projector[2] has partitioned or special parameters"


def test_tensor_subclasses_are_not_read():
    class Special(torch.Tensor):
        pass

    _, fused = pair()
    weight = fused.mlp_projector[0].weight.data.as_subclass(Special)
    fused.mlp_projector[0].weight = nn.Parameter(weight)
    assert fused.explain().path == "pooled"


def test_global_hooks_see_what_they_see_in_the_reference():
    oracle, fused = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda mod, a, y: seen.append(mod))
    try:
        plan = fused.explain()
        oracle(torch.randn(1, 16, 8))
        want = seen[:-1]
        seen.clear()
        fused(torch.randn(1, 16, 8))
    finally:
        handle.remove()
    assert plan.path == "modules"
    assert plan.reason.startswith("the global module hook test_projector.")
    assert seen == [*want, fused]


def test_a_bias_that_is_a_buffer():
    oracle, fused = pair()
    first = oracle.mlp_projector[0]
    bias = first.bias.detach()
    del first.bias
    first.register_buffer("bias", bias)
    x = torch.randn(2, 16, 8)
    assert fused.explain().reason == "mlp_projector[0] has partitioned or special parameters"
    assert torch.equal(fused(x), oracle(x))


def test_an_mlp_without_parameters():
    oracle, fused = pair()
    mlp = oracle.mlp_projector
    mlp[0], mlp[2] = Quantised(mlp[0]), Quantised(mlp[2])
    x = torch.randn(2, 16, 8)
    assert fused.explain().reason == "mlp_projector[0] is Quantised, or hooked"
    assert torch.equal(fused(x), oracle(x))


def test_backward_hooks_fire():
    _, fused = pair()
    seen = []
    fused.mlp_projector[2].register_full_backward_hook(lambda *_: seen.append("called"))
    fused(torch.randn(1, 16, 8)).sum().backward()
    assert seen == ["called"]


def test_inference_and_no_grad():
    oracle, fused = pair()
    x = torch.randn(1, 16, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), oracle(x))
    with torch.inference_mode():
        torch.testing.assert_close(fused(x), oracle(x))
    assert saved_bytes(lambda: fused.requires_grad_(False)(x)) == 0


def test_any_parameters_may_be_frozen():
    """Every choice of what trains gets the gradients that the oracle gets."""
    oracle, fused = pair(3)
    parameters = dict(oracle.named_parameters())
    x, dy = torch.randn(2, 16, 8), torch.randn(2, 4, 12)
    for chosen in range(1, 2 ** len(parameters)):
        for i, parameter in enumerate(parameters.values()):
            parameter.requires_grad_(bool(chosen >> i & 1))
        alive = [p for p in parameters.values() if p.requires_grad]
        found, want = (torch.autograd.grad(m(x), alive, dy) for m in (fused, oracle))
        torch.testing.assert_close(found, want)


def test_meta_device():
    _, fused = pair()
    fused.to("meta")
    assert fused(torch.empty(2, 16, 8, device="meta")).shape == (2, 4, 12)
    assert fused.explain().path == "fused"


def test_training_takes_the_same_steps():
    oracle, _ = pair()
    fused = FusedAvgPoolProjector.from_reference(copy.deepcopy(oracle))
    runs = []
    for module in (oracle, fused):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        for _ in range(20):
            loss = module(torch.randn(2, 16, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        runs.append(list(module.parameters()))
    torch.testing.assert_close(*runs)
