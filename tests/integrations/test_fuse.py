"""Does ``fuse`` replace what it knows, exactly and reversibly?"""

import copy
import io
import operator
import pickle

import pytest
import torch
from numeric import numeric, wrong
from stock import (
    EncoderTower,
    LlavaLike,
    PerceptionProjector,
    PllavaProjector,
    SeedProjector,
    UnshufflingTower,
)
from stock.kinds import (
    KINDS,
    Called,
    changes,
    computes,
    kind_errors,
    kinds,
    pair,
    projecting,
)

from deco_kernels import fuse, unfuse
from deco_kernels.integrations import explain


@numeric
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_as_near_to_float64_as_the_stock_ones(kind, dtype):
    found = kind_errors(*pair(kind), kind, dtype)
    assert not wrong(found)


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_what_it_says(kind, training):
    stock, fused = (module.train(training) for module in pair(kind))
    x = torch.randn(kind.shape, requires_grad=True)
    assert fused.training == training
    assert all(plan.path == "fused" for plan in explain(fused).values())
    unpooled = kind is KINDS["matryoshka, unpooled"]
    assert computes(fused, kind, x) != unpooled
    assert not computes(stock, kind, x)


@kinds
def test_module_stays_the_same_object(kind):
    module = kind.make()
    before = copy.deepcopy(module.state_dict())
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    fuse(module)
    assert isinstance(module, type(kind.make()))
    assert type(module).__name__ == type(kind.make()).__name__
    assert module.state_dict().keys() == before.keys()
    assert all(p is parameters[name] for name, p in module.named_parameters())
    assert all(b is buffers[name] for name, b in module.named_buffers())
    module.load_state_dict(before)
    kind.make().load_state_dict(module.state_dict())


@kinds
def test_no_other_name_is_added(kind):
    """Libraries ask a model for attributes such as ``module`` and act on them."""
    stock, fused = pair(kind)
    added = set(dir(fused)) - set(dir(stock))
    assert added == {"_deco_kernels", "deco_kind", "deco_original"}


@kinds
def test_idempotent_and_reversible(kind):
    stock, fused = pair(kind)
    once = type(fused)
    again = fuse(fused)
    assert not again.replaced
    assert again.left[""] == "it is fused already"
    assert type(fused) is once
    assert [*unfuse(fused).replaced] == [""]
    assert type(fused) is type(stock)
    assert fused.__dict__.keys() == stock.__dict__.keys()
    x = torch.randn(kind.shape)
    assert torch.equal(kind.call(fused, x), kind.call(stock, x))
    assert not unfuse(fused).replaced
    fuse(fused)
    assert type(fused) is once


@kinds
def test_a_shallow_copy_shares_its_parameters(kind):
    _, fused = pair(kind)
    other = copy.copy(fused)
    assert type(other) is type(fused)
    assert all(map(operator.is_, other.parameters(), fused.parameters()))


@kinds
def test_copies_and_pickles(kind):
    stock, fused = pair(kind)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    x = torch.randn(kind.shape)
    for other in (
        copy.deepcopy(fused),
        pickle.loads(pickle.dumps(fused)),
        torch.load(file, weights_only=False),
    ):
        assert type(other) is type(fused)
        assert other is not fused
        assert torch.equal(kind.call(other, x), kind.call(fused, x))
        assert {p.data_ptr() for p in other.parameters()}.isdisjoint(
            p.data_ptr() for p in fused.parameters()
        )
        unfuse(other)
        assert torch.equal(kind.call(other, x), kind.call(stock, x))


@projecting
@changes
def test_a_changed_layer_is_called_and_it_says_so(kind, change):
    stock, fused = pair(kind)
    for module in (stock, fused):
        torch.manual_seed(1)
        change(module, kind.last)
    x = torch.randn(kind.shape)
    got, want = kind.call(fused, x), kind.call(stock, x)
    (plan,) = explain(fused).values()
    assert plan.path == "stock"
    assert kind.last.rpartition(".")[2] in plan.reason
    assert torch.equal(got, want)


@projecting
@changes
def test_a_layer_changed_before_is_left_alone(kind, change):
    module = kind.make()
    change(module, kind.last)
    own = type(module)
    report = fuse(module)
    assert not report.replaced
    assert "" in report.left
    assert type(module) is own


def test_a_changed_pooling_is_called():
    stock, fused = pair(KINDS["perception"])
    for module in (stock, fused):
        module.pooling.register_forward_hook(lambda m, a, y: 2 * y)
    x = torch.randn(2, 36, 8)
    assert torch.equal(fused(x), stock(x))
    assert explain(fused)[""].reason == "pooling is hooked"


def test_partitioned_parameters_are_not_read():
    stock, fused = pair(KINDS["perception"])
    whole = fused.linear_2.weight.data
    fused.linear_2.weight.data = whole.new_empty(0)
    assert "partitioned" in explain(fused)[""].reason

    # As a sharding wrapper does: gathers in front of the call, releases behind it.
    def gather(module, args):
        module.weight.data = whole

    fused.linear_2.register_forward_pre_hook(gather)
    x = torch.randn(2, 36, 8)
    assert torch.equal(fused(x), stock(x))


@pytest.mark.parametrize("name", ["seed", "perception", "pllava", "llava, average", "encoder"])
def test_hooks_of_the_module_itself_fire(name):
    kind = KINDS[name]
    _, fused = pair(kind)
    seen = []
    fused.register_forward_pre_hook(lambda m, a: seen.append("before"))
    fused.register_forward_hook(lambda m, a, y: seen.append("behind"))
    x = torch.randn(kind.shape, requires_grad=True)
    assert computes(fused, kind, x)
    assert seen == ["before", "behind"]


def test_nothing_global():
    """Other instances, their class, and the random generator stay what they are."""
    forward, state = PerceptionProjector.forward, torch.get_rng_state()
    one, other = PerceptionProjector(), PerceptionProjector()
    torch.set_rng_state(state)
    fuse(one)
    for make in (LlavaLike, PllavaProjector, SeedProjector, EncoderTower, UnshufflingTower):
        module = make()
        state = torch.get_rng_state()
        fuse(module)
        assert torch.equal(torch.get_rng_state(), state)
    assert PerceptionProjector.forward is forward
    assert type(other) is PerceptionProjector
    assert type(one) is not PerceptionProjector


def test_the_modes_of_the_caller_do_not_matter():
    with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
        report = fuse(PerceptionProjector())
    assert [*report.replaced] == [""]


def test_backend_passes_through():
    for kind in KINDS.values():
        _, fused = pair(kind, backend="eager")
        assert explain(fused)[""].backend == "eager"
        assert "tokens are on the CPU" not in explain(fused)[""].reason


def test_bad_arguments():
    for function in (fuse, unfuse, explain):
        with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
            function({})
    module = PerceptionProjector()
    with pytest.raises(ValueError, match="backend"):
        fuse(module, backend="best")
    assert type(module) is PerceptionProjector


def test_errors_are_the_original_ones():
    stock, fused = pair(KINDS["perception"])
    for module in (stock, fused):
        with pytest.raises(ValueError, match="35 tokens are no square"):
            module(torch.randn(2, 35, 8))
    _, fused = pair(KINDS["pllava"])
    with pytest.raises(AssertionError):
        fused(torch.randn(5, 30, 8), "video", 1, 1)


def test_empty_batch():
    stock, fused = pair(KINDS["perception"])
    x = torch.randn(0, 36, 8)
    assert fused(x).shape == stock(x).shape == (0, 9, 12)


@pytest.mark.parametrize("name", ["perception", "pllava", "seed"])
def test_compiles_in_one_graph(name):
    kind = KINDS[name]
    stock, fused = pair(kind)
    x = torch.randn(kind.shape, requires_grad=True)
    compiled = torch.compile(Called(fused, kind.call), fullgraph=True, backend="aot_eager")
    y, want = compiled(x), kind.call(stock, x)
    torch.testing.assert_close(y, want)
    for a, b in zip(
        torch.autograd.grad(y.sum(), x), torch.autograd.grad(want.sum(), x), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_autocast():
    stock, fused = pair(KINDS["perception"])
    x = torch.randn(2, 36, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = fused(x), stock(x)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=1e-2)
