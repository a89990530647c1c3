"""Are the operators what torch expects? Schemas, fakes, torch.compile, no hidden gradients."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck

from deco_kernels import AvgPoolProjector, FusedAvgPoolProjector, Stencil, pool, pool_linear

OPS = torch.ops.deco_kernels


def tables(dtype=torch.float32):
    return Stencil.adaptive((5, 4), (3, 3)).tables("cpu", dtype)


@pytest.mark.parametrize("batch", [0, 1, 3])
def test_opcheck(batch):
    x, w = torch.randn(batch, 21, 6)[:, 1:], torch.randn(7, 6)
    rows, columns = tables()
    opcheck(OPS.pool.default, (x, *rows, torch.float32, None, "eager"))
    opcheck(OPS.pool.default, (x, *rows, torch.float32, "silu", "eager"))
    dp = torch.randn(batch, 9, 6).half()
    opcheck(OPS.pool.default, (dp, *columns, torch.float16, None, "eager"))
    opcheck(OPS.dact_pool.default, (dp.float(), *columns[:3], x, "gelu", "eager"))
    for activation, keep_z in ((None, True), ("gelu", True), ("gelu", False)):
        for bias in (None, torch.randn(7)):
            opcheck(OPS.pool_linear.default, (x, *rows, w, bias, activation, keep_z, None, "eager"))
    dy, z = torch.randn(9 * batch, 7), torch.randn(9 * batch, 6)
    for want_g in (True, False):
        for want_db in (True, False):
            opcheck(OPS.dact_linear.default, (dy, w, z, want_g, want_db, "eager"))


def test_operators_refuse_to_be_differentiated():
    rows, _ = tables()
    with pytest.raises(RuntimeError, match="operators do not differentiate"):
        OPS.pool(torch.randn(1, 20, 6, requires_grad=True), *rows, torch.float32, None, "eager")


@pytest.mark.parametrize("layer_num", [1, 2, 3])
def test_compile_without_graph_breaks_and_with_dynamic_batch(layer_num):
    torch.compiler.reset()
    oracle = AvgPoolProjector(layer_num, 9, 16, 24)
    fused = FusedAvgPoolProjector.from_reference(oracle)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(fused, fullgraph=True, backend=backend)
    for batch in (2, 3, 5, 7):
        x = torch.randn(batch, 49, 16, requires_grad=True)
        runs = []
        for module in (compiled, oracle):
            y = module(x)
            runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *oracle.parameters()])])
        torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 2  # one for the first batch size, one for all others


@pytest.mark.parametrize("dynamic", [None, True])
def test_compile_with_changing_grids(dynamic):
    torch.compiler.reset()
    oracle = AvgPoolProjector(2, 4, 8, 16)
    fused = FusedAvgPoolProjector.from_reference(oracle)
    compiled = torch.compile(fused, fullgraph=True, dynamic=dynamic, backend="eager")
    for side in (3, 4, 5):
        x = torch.randn(side, side * side, 8)
        torch.testing.assert_close(compiled(x), oracle(x))
    for grid in ((3, 4), (4, 3), (2, 6)):
        x = torch.randn(2, 12, 8)
        torch.testing.assert_close(compiled(x, grid), fused(x, grid))


def test_compile_functions_with_dynamic_sizes():
    torch.compiler.reset()
    stencil = Stencil.adaptive((4, 4), (2, 2))
    w = torch.randn(6, 8)
    compiled = torch.compile(pool_linear, fullgraph=True, dynamic=True, backend="eager")
    for batch in (1, 2, 3):
        x = torch.randn(batch, 16, 8)
        found = compiled(x, w, None, stencil)
        torch.testing.assert_close(found, pool_linear(x, w, None, stencil))


def test_export_with_dynamic_batch():
    fused = FusedAvgPoolProjector(2, 9, 8, 16).eval()
    x = torch.randn(2, 25, 8)
    shapes = {"x": {0: torch.export.Dim("b", min=1, max=64)}}
    program = torch.export.export(fused, (x,), dynamic_shapes=shapes)
    again = torch.randn(5, 25, 8)
    torch.testing.assert_close(program.module()(again), fused(again))


def test_compile_with_inductor():
    torch.compiler.reset()
    fused = FusedAvgPoolProjector(2, 4, 8, 16)
    x = torch.randn(2, 16, 8, requires_grad=True)
    torch.use_deterministic_algorithms(False)  # filling memory is not inductor's to do
    y = torch.compile(fused, fullgraph=True)(x)
    torch.testing.assert_close(y, fused(x))
    (compiled_dx,) = torch.autograd.grad(y.sum(), x)
    (dx,) = torch.autograd.grad(fused(x).sum(), x)
    torch.testing.assert_close(compiled_dx, dx)


def test_memory_is_estimated_with_fake_tensors():
    pack = Stencil.packed([(4, 4), (6, 5)], target=(2, 3))
    with FakeTensorMode():
        fused = FusedAvgPoolProjector(2, 9, 8, 12)
        x = torch.randn(2, 49, 8, requires_grad=True)
        y = fused(x)
        y.sum().backward()
        assert (y.shape, x.grad.shape) == ((2, 9, 12), (2, 49, 8))
        assert pool(torch.randn(1, 46, 8), pack).shape == (1, 12, 8)
    assert type(pool(torch.randn(1, 46, 8), pack)) is torch.Tensor  # what is kept is no fake
