"""Do torch.compile, torch.export, tracers and transforms see what eager mode computes?"""

import io
import warnings
from contextlib import nullcontext

import pytest
import torch
from machines.cuda import on_host, require_compilers
from stock import PerceptionProjector
from torch.autograd import forward_ad

from deco_kernels import (
    AvgPoolProjector,
    FusedAvgPoolProjector,
    Stencil,
    act_linear,
    act_pool_linear,
    fuse,
    pool,
    pool_linear,
)

STENCILS = {
    "adaptive": Stencil.adaptive((4, 4), (2, 2)),
    "ragged": Stencil.adaptive((5, 7), (3, 4)),
    "1-D": Stencil.adaptive((9,), (4,)),
    "3-D": Stencil.adaptive((3, 4, 5), (2, 2, 3)),
    "fixed": Stencil.fixed((6, 8), 3, 2, 1, True, False),
    "fixed 1-D": Stencil.fixed((9,), 3, 2, 1),
    "bilinear": Stencil.bilinear((5, 7), (3, 4)),
    "bilinear 3-D": Stencil.bilinear((3, 4, 5), (2, 3, 2), True),
    "identity": Stencil.identity(4),
    "concat": Stencil.concat([Stencil.identity(1), Stencil.adaptive((4, 4), (2, 2))]),
    "packed": Stencil.packed([(4, 4), (6, 2)], merge=2),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A compiler that counts the graphs, and leaves them as they are."""

    count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph


def backends_of(device_backend):
    """Where a backend runs here, and the dtype that its kernels are for."""
    if device_backend == "eager":
        return nullcontext(), torch.float32
    require_compilers()
    return on_host(), torch.float16


def functions(dtype):
    """Each function, of tokens with 8 channels, as one of tokens and a backend."""
    w, b, v, c = (torch.randn(s).to(dtype).requires_grad_() for s in ((6, 8), (6,), (5, 6), (5,)))

    def chain(x, stencil, backend):
        hidden = pool_linear(x, w, b, stencil, "gelu", backend=backend)
        return act_linear(hidden, v, c, backend=backend)

    # All tokens weigh one in all of these stencils but the padded fixed one.
    return {
        "pool": (lambda x, s, backend: pool(x, s, backend=backend), []),
        "pool_linear": (lambda x, s, backend: pool_linear(x, w, b, s, backend=backend), [w, b]),
        "act_linear": (chain, [w, b, v, c]),
        "act_pool_linear": (
            lambda x, s, backend: act_pool_linear(x, w, None, s, "quick_gelu", backend=backend),
            [w],
        ),
    }


@pytest.mark.parametrize(
    ("compiler", "dynamic"),
    [
        ("eager", None),
        ("aot_eager", True),
        pytest.param("eager", True, marks=pytest.mark.slow),
        pytest.param("aot_eager", None, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("backend", ["eager", "cuda"])
@pytest.mark.parametrize("name", ["pool", "pool_linear", "act_linear", "act_pool_linear"])
def test_compiled_gradients_of_functions(name, backend, compiler, dynamic):
    where, dtype = backends_of(backend)
    function, parameters = functions(dtype)[name]
    stencils = STENCILS.values() if name == "pool" and compiler == "eager" else [
        STENCILS["ragged"], STENCILS["packed"]
    ]  # fmt: skip
    with where:
        for stencil in stencils:
            torch.compiler.reset()
            compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=compiler)
            x = torch.randn(2, stencil.n_in, 8).to(dtype).requires_grad_()
            runs = []
            for run in (compiled, function):
                y = run(x, stencil, backend)
                runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *parameters])])
            assert any(g.any() for g in runs[0][1:])
            tolerance = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["eager", "cuda"])
@pytest.mark.parametrize("layer_num", [1, 2, 3])
def test_compiled_modules_with_dynamic_batch(layer_num, backend):
    where, dtype = backends_of(backend)
    oracle = AvgPoolProjector(layer_num, 9, 16, 24).to(dtype)
    fused = FusedAvgPoolProjector.from_reference(oracle, backend=backend)
    graphs = Graphs()
    compiled = torch.compile(fused, fullgraph=True, backend=graphs)
    with where:
        for batch in (2, 3, 5, 7):
            x = torch.randn(batch, 49, 16).to(dtype).requires_grad_()
            runs = []
            for module in (compiled, fused):
                y = module(x)
                loss = y.float().square().mean()
                runs.append([y, *torch.autograd.grad(loss, [x, *oracle.parameters()])])
            tolerance = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(*runs, rtol=tolerance, atol=tolerance)
    assert graphs.count == 2  # one for the first batch size, one for all others


def squares(module, mark):
    for side in range(4, 20):
        x = torch.randn(2, side * side, 8)
        if mark:
            torch._dynamo.mark_dynamic(x, 1)
        yield (x,)


def count_graphs(function, calls, dynamic):
    torch.compiler.reset()
    graphs = Graphs()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=graphs)
    for args in calls:
        torch.testing.assert_close(compiled(*args), function(*args))
    return graphs.count


@pytest.mark.parametrize("how", ["default", "dynamic=True", "marked"])
@pytest.mark.parametrize("make", ["projector", "fuse"])
def test_any_number_of_grids_takes_as_many_graphs_as_stock(make, how):
    stock = AvgPoolProjector(2, 4, 8, 16)
    fused = FusedAvgPoolProjector.from_reference(stock)
    if make == "fuse":
        fused = AvgPoolProjector(2, 4, 8, 16)
        assert fuse(fused).replaced
    dynamic = True if how == "dynamic=True" else None
    ours, wanted = (count_graphs(m, squares(m, how == "marked"), dynamic) for m in (fused, stock))
    assert ours <= wanted <= 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_oblong_grids_and_stencils_are_two_graphs_at_most(dynamic):
    fused = FusedAvgPoolProjector(2, 4, 8, 16)
    grids = [(n, n + 3) for n in range(4, 20)]
    calls = [(torch.randn(2, h * w, 8), (h, w)) for h, w in grids]
    assert count_graphs(fused, calls, dynamic) <= 2
    for make in (Stencil.adaptive, Stencil.bilinear):
        calls = [(torch.randn(2, h * w, 8), make((h, w), (3, 2))) for h, w in grids]
        assert count_graphs(pool, calls, dynamic) <= 2


def test_compile_with_inductor():
    fused = FusedAvgPoolProjector(2, 4, 8, 16)
    x = torch.randn(2, 16, 8, requires_grad=True)
    torch.use_deterministic_algorithms(False)  # filling memory is not inductor's to do
    y = torch.compile(fused, fullgraph=True)(x)
    torch.testing.assert_close(y, fused(x))
    (compiled_dx,) = torch.autograd.grad(y.sum(), x)
    (dx,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(compiled_dx, dx)


@pytest.mark.parametrize("forward", ["compiled", "as it is", "autocast"])
@pytest.mark.parametrize("backend", ["eager", "cuda"])
def test_compiled_autograd(backend, forward):
    where, dtype = backends_of(backend)
    module = torch.nn.Sequential(
        torch.nn.Linear(8, 8), FusedAvgPoolProjector(2, 4, 8, 12, backend=backend)
    ).to(dtype)
    x = torch.randn(3, 16, 8).to(dtype)
    region = torch.autocast("cpu", torch.bfloat16, enabled=forward == "autocast")
    with where:
        run = torch.compile(module, backend="aot_eager") if forward == "compiled" else module
        with region:
            loss = module(x).float().square().mean()
        loss.backward()
        want = [p.grad.clone() for p in module.parameters()]
        module.zero_grad()
        with torch._dynamo.config.patch(compiled_autograd=True):
            with region:
                loss = run(x).float().square().mean()
            with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
                loss.backward()
    found = [p.grad for p in module.parameters()]
    torch.testing.assert_close(found, want, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_export_has_the_fused_operators(strict, tracked):
    where, dtype = backends_of("cuda")
    fused = FusedAvgPoolProjector(2, 4, 16, 24, backend="cuda").to(dtype).eval()
    x = torch.randn(2, 16, 16).to(dtype)
    shapes = {"x": {0: torch.export.Dim("b", min=1, max=64)}}
    with where, torch.set_grad_enabled(tracked):
        program = torch.export.export(fused, (x,), dynamic_shapes=shapes, strict=strict)
        called = {str(node.target) for node in program.graph.nodes}
        assert "deco_kernels.pool_linear.default" in called
        assert ("deco_kernels.act_linear.default" in called) == tracked  # else a plain product
        assert not any("adaptive_avg_pool" in name for name in called)
        again = torch.randn(5, 16, 16).to(dtype)
        torch.testing.assert_close(program.module()(again), fused(again))
        saved = io.BytesIO()
        torch.export.save(program, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.export.load(saved).module()(again), fused(again))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "cuda"])
def test_aot_inductor(backend, tmp_path):
    where, dtype = backends_of(backend)
    fused = FusedAvgPoolProjector(2, 4, 16, 24, backend=backend).to(dtype).eval()
    x, again = torch.randn(2, 16, 16).to(dtype), torch.randn(5, 16, 16).to(dtype)
    shapes = {"x": {0: torch.export.Dim("b", min=1, max=64)}}
    with where, torch.no_grad():
        program = torch.export.export(fused, (x,), dynamic_shapes=shapes)
        file = str(tmp_path / "projector.pt2")
        torch._inductor.aoti_compile_and_package(program, package_path=file)
        torch.testing.assert_close(torch._inductor.aoti_load_package(file)(again), fused(again))


@pytest.mark.parametrize("strict", [True, False])
def test_export_without_kernels_is_torchs_own_operators(strict):
    fused = FusedAvgPoolProjector(2, 9, 8, 16).eval()
    x = torch.randn(2, 25, 8)
    shapes = {"x": {0: torch.export.Dim("b", min=1, max=64)}}
    program = torch.export.export(fused, (x,), dynamic_shapes=shapes, strict=strict)
    again = torch.randn(5, 25, 8)
    torch.testing.assert_close(program.module()(again), fused(again))
    assert not any("deco_kernels" in str(node.target) for node in program.graph.nodes)
    program.module()(again).sum().backward()  # and they differentiate


@pytest.mark.parametrize("tracked", [True, False])
def test_jit_trace(tracked):
    fused = FusedAvgPoolProjector(2, 4, 16, 24).eval()
    x, again = torch.randn(2, 16, 16), torch.randn(5, 16, 16)
    with warnings.catch_warnings(), torch.set_grad_enabled(tracked):
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(fused, x)
        saved = io.BytesIO()
        torch.jit.save(traced, saved)
        saved.seek(0)
        torch.testing.assert_close(torch.jit.load(saved)(again), fused(again))


@pytest.mark.parametrize("dynamo", [True, False], ids=["exported", "traced"])
@pytest.mark.parametrize("name", ["FusedAvgPoolProjector", "PerceptionProjector"])
def test_onnx_has_torchs_own_operators(name, dynamo, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    module = FusedAvgPoolProjector(2, 4, 8, 12) if name[0] == "F" else PerceptionProjector(8, 12)
    module, x, file = module.eval(), torch.randn(2, 16, 8), tmp_path / "projector.onnx"
    stock = module(x)
    if name[0] == "P":
        assert fuse(module).replaced
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(module, (x,), dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(module, (x,), str(file), dynamo=False)
    exported = onnx.load(file)
    assert {"AveragePool", "Gelu"} <= {node.op_type for node in exported.graph.node}
    run = ReferenceEvaluator(exported)
    (y,) = run.run(None, {run.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), stock)


@pytest.mark.parametrize("how", ["eager", "compiled", "traced", "vmap"])
def test_identity_is_a_copy(how):
    """As every pooling, whoever looks on: it may be changed in place."""

    def change(x):
        before = x * 1
        pool(before, STENCILS["identity"]).add_(1)
        return before

    x = torch.randn(3, 2, 4, 8)
    run = {
        "eager": lambda: change(x[0]),
        "compiled": lambda: torch.compile(change, fullgraph=True, backend="eager")(x[0]),
        "traced": lambda: torch.jit.trace(change, x[1])(x[0]),
        "vmap": lambda: torch.func.vmap(change)(x)[0],
    }[how]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(run(), x[0])


def test_forward_mode():
    stock = AvgPoolProjector(2, 4, 8, 12)
    fused = FusedAvgPoolProjector.from_reference(stock)
    x, dx = torch.randn(2, 1, 16, 8)
    found = []
    for module in (stock, fused):
        _, product = torch.func.linearize(module, x)
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, dx))).tangent
        found.append([product(dx), tangent])
    torch.testing.assert_close(*found)


def test_transforms_of_torch_func():
    stock = AvgPoolProjector(2, 4, 8, 12)
    fused = FusedAvgPoolProjector.from_reference(stock)
    x = torch.randn(3, 2, 16, 8)
    torch.testing.assert_close(torch.func.vmap(fused)(x), torch.func.vmap(stock)(x))
    for module in (fused, stock):
        module.jacobian = torch.func.jacrev(lambda t, m=module: m(t).sum((0, 2)))(x[0])
    torch.testing.assert_close(fused.jacobian, stock.jacobian)
    values, slopes = torch.func.jvp(fused, (x[0],), (x[1],))
    torch.testing.assert_close((values, slopes), torch.func.jvp(stock, (x[0],), (x[1],)))


@pytest.mark.parametrize("name", ["pool", "pool_linear", "act_linear", "act_pool_linear"])
def test_transforms_of_kernels_are_an_error_with_a_remedy(name):
    where, dtype = backends_of("cuda")
    function, _ = functions(dtype)[name]
    x = torch.randn(3, 2, 16, 8).to(dtype)
    first = "pool_linear" if name == "act_linear" else name
    with where, pytest.raises(RuntimeError, match=f"^{first} with backend 'cuda' .*'eager'"):
        torch.func.vmap(lambda t: function(t, STENCILS["adaptive"], "cuda"))(x)
    torch.func.vmap(lambda t: function(t, STENCILS["adaptive"], "eager"))(x)
