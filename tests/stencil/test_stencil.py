"""Are the tables torch's pooling, and their transposes?"""

import itertools
from math import prod

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import Stencil, pool

ADAPTIVE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
FIXED = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
LINEAR = ("linear", "bilinear", "trilinear")


def dense(table, columns: int) -> torch.Tensor:
    matrix = torch.zeros(len(table.index), columns, dtype=torch.double)
    return matrix.scatter_add_(1, table.index.long(), table.weight)


def as_matrix(grid_in, function) -> torch.Tensor:
    """A linear function of [n, 1, *grid_in] as [n_out, n_in], from what it makes of units."""
    n_in = prod(grid_in)
    units = torch.eye(n_in, dtype=torch.double).view(n_in, 1, *grid_in)
    return function(units).reshape(n_in, -1).T


def torch_adaptive(grid_in, grid_out) -> torch.Tensor:
    return as_matrix(grid_in, lambda x: ADAPTIVE[len(grid_in) - 1](x, grid_out))


def torch_bilinear(grid_in, grid_out, align_corners=False) -> torch.Tensor:
    mode = LINEAR[len(grid_in) - 1]
    return as_matrix(
        grid_in,
        lambda x: F.interpolate(x, size=grid_out, mode=mode, align_corners=align_corners),
    )


def check(stencil, want) -> None:
    """The stencil's tables are the matrix ``want``, exact and compact, and its transpose."""
    rows, columns = stencil.tables()
    assert (stencil.n_out, stencil.n_in) == tuple(want.shape)
    found = dense(rows, stencil.n_in)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-14)
    assert torch.equal(dense(columns, stencil.n_out), found.T)
    for table, matrix in ((rows, found), (columns, found.T)):
        lengths = matrix.count_nonzero(1)
        # No window is longer than the longest, and only shorter windows are padded.
        assert table.index.shape == (len(matrix), max(int(lengths.max()), 1))
        assert torch.equal(table.weight.count_nonzero(1), lengths)
        assert table.ragged == bool((table.weight == 0).any())
        assert torch.equal(table.weight[:, 0] != 0, lengths > 0)
        assert table.index.dtype == torch.int32
        # The padding stays in the window, if there is one.
        own = matrix.gather(1, table.index.long()) != 0
        assert own[lengths > 0].all()
    assert stencil.sums_to_one == bool(((want.sum(1) - 1).abs() < 1e-9).all())


@pytest.mark.parametrize("n_in", range(1, 33))
def test_adaptive_is_torchs_for_every_size(n_in):
    for n_out in range(1, 33):
        for grid_in, grid_out in (((n_in, 2), (n_out, 3)), ((3, n_in), (2, n_out))):
            check(Stencil.adaptive(grid_in, grid_out), torch_adaptive(grid_in, grid_out))


def grids(axes: int, largest: int):
    return itertools.product(range(1, largest + 1), repeat=axes)


@pytest.mark.parametrize(("axes", "largest"), [(1, 12), (2, 4), (3, 3)])
def test_adaptive_and_area_are_torchs_for_every_grid(axes, largest):
    for grid_in, grid_out in itertools.product(grids(axes, largest), repeat=2):
        check(Stencil.adaptive(grid_in, grid_out), torch_adaptive(grid_in, grid_out))
        area = as_matrix(grid_in, lambda x, size=grid_out: F.interpolate(x, size, mode="area"))
        check(Stencil.area(grid_in, grid_out), area)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("axes", "largest"), [(1, 24), (2, 4), (3, 3)])
def test_bilinear_is_torchs_for_every_grid(axes, largest, align_corners):
    for grid_in, grid_out in itertools.product(grids(axes, largest), repeat=2):
        stencil = Stencil.bilinear(grid_in, grid_out, align_corners)
        want = torch_bilinear(grid_in, grid_out, align_corners)
        rows, columns = stencil.tables()
        # torch rounds the places of tokens otherwise, in the last digit.
        torch.testing.assert_close(dense(rows, stencil.n_in), want, rtol=0, atol=1e-13)
        assert torch.equal(dense(columns, stencil.n_out), dense(rows, stencil.n_in).T)
        assert stencil.sums_to_one


def every_fixed(n: int, ceil_mode: bool):
    """All windows of an axis of ``n`` tokens that torch takes: kernel, stride, padding."""
    for kernel, stride in itertools.product(range(1, n + 3), range(1, n + 3)):
        for padding in range(kernel // 2 + 1):
            if kernel <= n + 2 * padding + ceil_mode * (stride - 1):
                yield kernel, stride, padding


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("ceil_mode", [True, False])
def test_fixed_is_torchs_for_every_window(ceil_mode, count_include_pad):
    how = ceil_mode, count_include_pad
    for n in range(1, 7):
        for window in every_fixed(n, ceil_mode):
            want = as_matrix((n,), lambda x, window=window: F.avg_pool1d(x, *window, *how))
            check(Stencil.fixed((n,), *window, *how), want)
    for shape in ((3, 5), (4, 2), (2, 3, 4)):
        pooling = FIXED[len(shape) - 1]
        # Of three axes torch pools no window that is larger than the grid without its padding.
        axes = [
            [w for w in every_fixed(n, ceil_mode) if len(shape) < 3 or w[0] <= n] for n in shape
        ]
        windows = list(itertools.product(*axes))
        for i in torch.randperm(len(windows))[:60].tolist():
            window = tuple(zip(*windows[i], strict=True))
            want = as_matrix(shape, lambda x, w=window, pooling=pooling: pooling(x, *w, *how))
            check(Stencil.fixed(shape, *window, *how), want)


def test_fixed_takes_one_int_for_all_axes():
    want = as_matrix((6, 9), lambda x: F.avg_pool2d(x, 3))
    check(Stencil.fixed((6, 9), 3), want)
    assert Stencil.fixed((6, 9), 3).geometry == Stencil.fixed((6, 9), (3, 3), 3, 0).geometry
    assert Stencil.fixed((6, 9), 3).sums_to_one
    assert not Stencil.fixed((6, 9), 3, padding=1).sums_to_one
    assert Stencil.fixed((6, 9), 3, padding=1, count_include_pad=False).sums_to_one


STENCILS = {
    "adaptive 1-D": (Stencil.adaptive((13,), (5,)), torch_adaptive((13,), (5,))),
    "adaptive 2-D": (Stencil.adaptive((5, 4), (3, 3)), torch_adaptive((5, 4), (3, 3))),
    "adaptive 3-D": (Stencil.adaptive((3, 5, 4), (2, 3, 3)), torch_adaptive((3, 5, 4), (2, 3, 3))),
    "upsampling": (Stencil.adaptive((2, 3), (5, 4)), torch_adaptive((2, 3), (5, 4))),
    "fixed 1-D": (
        Stencil.fixed((9,), 3, 2, 1),
        as_matrix((9,), lambda x: F.avg_pool1d(x, 3, 2, 1)),
    ),
    "fixed 2-D": (
        Stencil.fixed((7, 6), (3, 2), 2, (1, 0), True, False),
        as_matrix((7, 6), lambda x: F.avg_pool2d(x, (3, 2), 2, (1, 0), True, False)),
    ),
    "fixed with gaps": (
        Stencil.fixed((7, 6), 2, 3),
        as_matrix((7, 6), lambda x: F.avg_pool2d(x, 2, 3)),
    ),
    "fixed 3-D": (Stencil.fixed((4, 4, 6), 2), as_matrix((4, 4, 6), lambda x: F.avg_pool3d(x, 2))),
    "linear": (Stencil.bilinear((7,), (12,)), torch_bilinear((7,), (12,))),
    "bilinear": (Stencil.bilinear((7, 9), (3, 4)), torch_bilinear((7, 9), (3, 4))),
    "bilinear with gaps": (Stencil.bilinear((9, 9), (3, 3)), torch_bilinear((9, 9), (3, 3))),
    "aligned corners": (
        Stencil.bilinear((7, 3), (4, 5), True),
        torch_bilinear((7, 3), (4, 5), True),
    ),
    "trilinear": (Stencil.bilinear((3, 4, 5), (2, 6, 3)), torch_bilinear((3, 4, 5), (2, 6, 3))),
    "identity": (Stencil.identity(5), torch.eye(5, dtype=torch.double)),
    "concatenation": (
        Stencil.concat([Stencil.identity(2), Stencil.adaptive((5, 4), (2, 3))]),
        torch.block_diag(torch.eye(2, dtype=torch.double), torch_adaptive((5, 4), (2, 3))),
    ),
}


def test_float64_is_exact_after_float32_of_the_same_stencil():
    """What is kept of a stencil, for one axis too, is kept for each dtype."""
    for sizes in ((13,), (13, 7)):
        stencil = Stencil.fixed(sizes, 3, 2)
        for dtype in (torch.float32, torch.float64):
            x = torch.ones(1, stencil.n_in, 1, dtype=dtype, requires_grad=True)
            (dx,) = torch.autograd.grad(pool(x, stencil).sum(), x)
        assert ((dx[0, 0] * 3 ** len(sizes)).item()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("stencil", "matrix"), STENCILS.values(), ids=STENCILS.keys())
def test_pool_and_its_gradient_are_the_matrix_and_its_transpose(stencil, matrix, dtype):
    """16-bit results are those of float64, rounded once."""
    x = torch.randn(3, stencil.n_in + 2, 6).to(dtype)[:, 2:].requires_grad_()  # strided
    p = pool(x, stencil)
    (dx,) = torch.autograd.grad(p, x, dp := torch.randn(p.shape).to(dtype))
    eps = torch.finfo(dtype).eps
    # torch computes the places of interpolated float32 tokens in float32.
    atol = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, eps / 64)
    for found, want in ((p, matrix @ x.double()), (dx, matrix.T @ dp.double())):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), want, rtol=0.51 * eps, atol=atol)
    if dtype == torch.float64:
        torch.testing.assert_close((p * dp).sum(), (x * dx).sum(), rtol=1e-14, atol=1e-13)


@pytest.mark.parametrize("name", ["fixed with gaps", "bilinear with gaps"])
def test_tokens_that_nobody_reads_have_no_gradient(name):
    stencil, matrix = STENCILS[name]
    x = torch.randn(2, stencil.n_in, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(pool(x, stencil), x, torch.full((2, stencil.n_out, 3), torch.nan))
    read = matrix.any(0)
    assert not read.all()
    assert (dx[:, ~read] == 0).all()
    assert dx[:, read].isnan().all()


@pytest.mark.parametrize("name", ["fixed 2-D", "bilinear with gaps", "concatenation"])
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_pool_agrees(name, backend):
    torch.compiler.reset()
    torch.use_deterministic_algorithms(False)  # filling memory is not inductor's to do
    stencil, _ = STENCILS[name]
    x = torch.randn(2, stencil.n_in, 5, requires_grad=True)
    found = torch.compile(pool, fullgraph=True, backend=backend)(x, stencil)
    want = pool(x, stencil)
    torch.testing.assert_close(found, want)
    dp = torch.randn_like(want)
    grads = (torch.autograd.grad(p, x, dp) for p in (found, want))
    torch.testing.assert_close(*grads)


def test_tables_are_built_once_per_geometry_device_and_dtype():
    first = Stencil.adaptive((6, 6), (3, 3)).tables("cpu", torch.float32)
    with torch.inference_mode(), torch.device("meta"):
        again = Stencil.adaptive([6, 6], (3, 3)).tables("cpu", torch.float32)
    assert first[0].index is again[0].index
    for fresh in (
        lambda: Stencil.adaptive((6, 31), (2, 3)),
        lambda: Stencil.bilinear((6, 31), (2, 3)),
        lambda: Stencil.fixed((6, 31), 5),
        lambda: Stencil.concat([Stencil.identity(3), Stencil.fixed((6, 31), 6)]),
        lambda: Stencil.packed([(6, 31), (31, 6)], target=(2, 3)),
        lambda: Stencil.from_position_ids(torch.zeros(1, 2, dtype=torch.int, device="cpu"), 1),
    ):
        with torch.inference_mode(), torch.device("meta"):
            tables = fresh().tables("cpu", torch.float32)
        for rows in tables:
            assert rows.weight.device.type == rows.index.device.type == "cpu"
            assert not rows.weight.is_inference()


def test_names_tell_the_grids():
    assert Stencil.adaptive((24, 24), (12, 8)).geometry == "adaptive 24x24 12x8"
    assert Stencil.bilinear((5,), (3,), True).geometry == "bilinear 5 3 corners"
    fixed = Stencil.fixed((6, 8), 3, 2, 1, True, False)
    assert fixed.geometry == "fixed 6x8 4x5 3x3 2x2 1x1 ceil exclude"
    assert Stencil.identity(3).geometry == "identity 3"


BAD = {
    "zero": (
        lambda: Stencil.adaptive((0, 4), (2, 2)),
        ValueError,
        r"grid_in\[0\] must be at least 1, got 0",
    ),
    "negative": (
        lambda: Stencil.area((4, 4), (2, -1)),
        ValueError,
        r"grid_out\[1\] must be at least 1, got -1",
    ),
    "no grid": (
        lambda: Stencil.adaptive((4, 4), 2),
        ValueError,
        r"grid_out must be 1 to 3 sizes such as \(height, width\), got 2",
    ),
    "four axes": (
        lambda: Stencil.adaptive((4, 4, 4, 4), (2, 2, 2, 2)),
        ValueError,
        "grid_in must be 1 to 3 sizes",
    ),
    "other axes": (
        lambda: Stencil.bilinear((4, 4, 4), (2, 2)),
        ValueError,
        r"grid_out must have 3 sizes as grid_in has, got \(2, 2\)",
    ),
    "float": (
        lambda: Stencil.bilinear((4, 4.0), (2, 2)),
        TypeError,
        r"grid_in\[1\] must be an int, got float 4.0",
    ),
    "bool": (
        lambda: Stencil.fixed((4, True), 2),
        TypeError,
        r"grid_in\[1\] must be an int, got bool True",
    ),
    "too many tokens": (
        lambda: Stencil.adaptive((2**16, 2**15), (2, 2)),
        ValueError,
        "grid_in has 2147483648 tokens, but the tables index at most 2147483647",
    ),
    "too many outputs": (
        lambda: Stencil.bilinear((2, 2), (2**16, 2**16)),
        ValueError,
        "the pooled grid has 4294967296 tokens",
    ),
    "kernel": (
        lambda: Stencil.fixed((4, 3), (4, 6), padding=1),
        ValueError,
        r"kernel\[1\] must fit grid_in\[1\] = 3 with padding 1 on both sides, got 6",
    ),
    "kernel of a tensor": (
        lambda: Stencil.fixed((4, 3), torch.tensor([2, 2])),
        TypeError,
        r"kernel\[0\] must be an int, got Tensor tensor",
    ),
    "kernels": (
        lambda: Stencil.fixed((4, 3), (2, 2, 2)),
        ValueError,
        r"kernel must be an int or 2 of them, got \(2, 2, 2\)",
    ),
    "padding": (
        lambda: Stencil.fixed((4, 3), 3, padding=2),
        ValueError,
        r"padding\[0\] must be at most half of kernel\[0\] = 3, got 2",
    ),
    "negative padding": (
        lambda: Stencil.fixed((4, 3), 3, padding=(0, -1)),
        ValueError,
        r"padding\[1\] must be at least 0, got -1",
    ),
    "no stride": (
        lambda: Stencil.fixed((4, 3), 3, 0),
        ValueError,
        r"stride\[0\] must be at least 1, got 0",
    ),
    "identity": (lambda: Stencil.identity(0), ValueError, "n must be at least 1, got 0"),
    "empty concatenation": (lambda: Stencil.concat([]), ValueError, "must hold a stencil"),
    "concatenated grid": (
        lambda: Stencil.concat([Stencil.identity(1), (4, 4)]),
        TypeError,
        r"stencils\[1\] must be a Stencil, got tuple",
    ),
    "wide concatenation": (
        lambda: Stencil.concat([Stencil.identity(2**20), Stencil.adaptive((64, 64), (1, 1))]),
        ValueError,
        "a table of 1048577 rows, as wide as the widest window of 4096 tokens, has more entries",
    ),
    "huge windows": (
        lambda: Stencil.adaptive((2, 2**16), (2**16, 2)).tables(),
        ValueError,
        "a table of 131072 rows, as wide as the widest window of 32768 tokens",
    ),
    "long concatenation": (
        lambda: Stencil.concat([Stencil.identity(2**30)] * 2),
        ValueError,
        "the concatenation has 2147483648 tokens",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_geometries(call, error, message):
    with pytest.raises(error, match=message):
        call()
