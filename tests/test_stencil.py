"""Are the tables torch's pooling, and their transposes?"""

import pytest
import torch
import torch.nn.functional as F

from deco_kernels import Stencil


def dense(table, columns: int) -> torch.Tensor:
    matrix = torch.zeros(len(table.index), columns, dtype=torch.double)
    return matrix.scatter_add_(1, table.index.long(), table.weight)


def torch_adaptive(grid_in, grid_out) -> torch.Tensor:
    """Adaptive pooling as a matrix [n_out, n_in], from what it makes of the unit vectors."""
    n_in = grid_in[0] * grid_in[1]
    units = torch.eye(n_in, dtype=torch.double).view(n_in, 1, *grid_in)
    return F.adaptive_avg_pool2d(units, grid_out).view(n_in, -1).T


@pytest.mark.parametrize("n_in", range(1, 33))
def test_adaptive_is_torchs_for_every_size(n_in):
    for n_out in range(1, 33):
        for grid_in, grid_out in (((n_in, 2), (n_out, 3)), ((3, n_in), (2, n_out))):
            rows, columns = Stencil.adaptive(grid_in, grid_out).tables()
            want = torch_adaptive(grid_in, grid_out)
            torch.testing.assert_close(dense(rows, want.shape[1]), want, rtol=0, atol=1e-15)
            assert torch.equal(dense(columns, want.shape[0]), dense(rows, want.shape[1]).T)


@pytest.mark.parametrize("grids", [((24, 24), (12, 12)), ((27, 27), (14, 14)), ((5, 9), (7, 2))])
def test_tables_are_compact(grids):
    """No window is longer than the longest, and only shorter windows are padded."""
    rows, columns = Stencil.adaptive(*grids).tables()
    matrix = torch_adaptive(*grids)
    assert rows.index.shape[1] == matrix.count_nonzero(dim=1).max()
    assert columns.index.shape[1] == matrix.count_nonzero(dim=0).max()
    for table, lengths in ((rows, matrix.count_nonzero(1)), (columns, matrix.count_nonzero(0))):
        assert torch.equal(table.weight.count_nonzero(1), lengths)
        assert table.ragged == bool((lengths < lengths.max()).any())
        assert table.index.dtype == torch.int32


def test_padding_stays_in_the_window():
    rows, columns = Stencil.adaptive((5, 4), (3, 3)).tables()
    for table, matrix in (
        (rows, torch_adaptive((5, 4), (3, 3))),
        (columns, torch_adaptive((5, 4), (3, 3)).T),
    ):
        for row, index in enumerate(table.index.tolist()):
            assert all(matrix[row, i] > 0 for i in index)


def test_tables_are_built_once_per_geometry_device_and_dtype():
    first = Stencil.adaptive((6, 6), (3, 3)).tables("cpu", torch.float32)
    with torch.inference_mode(), torch.device("meta"):
        again = Stencil.adaptive([6, 6], (3, 3)).tables("cpu", torch.float32)
    assert first[0].index is again[0].index
    fresh = Stencil.adaptive((6, 6), (2, 3))
    with torch.inference_mode(), torch.device("meta"):
        rows, _ = fresh.tables("cpu", torch.float32)
    assert rows.weight.device.type == "cpu"
    assert not rows.weight.is_inference()


@pytest.mark.parametrize(
    ("grids", "error", "message"),
    [
        (((0, 4), (2, 2)), ValueError, r"grid_in\[0\] must be at least 1, got 0"),
        (((4, 4), (2, -1)), ValueError, r"grid_out\[1\] must be at least 1, got -1"),
        (((4, 4), 2), ValueError, r"grid_out must be a pair \(height, width\), got 2"),
        (((4, 4, 4), (2, 2)), ValueError, r"grid_in must be a pair"),
        (((4, 4.0), (2, 2)), TypeError, r"grid_in\[1\] must be an int, got float 4.0"),
        (((4, True), (2, 2)), TypeError, r"grid_in\[1\] must be an int, got bool True"),
    ],
)
def test_bad_grids(grids, error, message):
    with pytest.raises(error, match=message):
        Stencil.adaptive(*grids)
