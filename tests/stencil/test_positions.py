"""Are tokens pooled by their positions, as Gemma 4 does?"""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deco_kernels import Stencil, act_pool_linear, pool


def by_cells(x, position_ids, kernel):
    """Gemma 4's rule, token by token: x [B, N, C], ids [B, N, 2] -> [outputs, C]."""
    outputs = []
    for tokens, ids in zip(x, position_ids.tolist(), strict=True):
        across = (max(i for i, _ in ids) + 1) // kernel
        cells = {}
        for token, (i, j) in zip(tokens, ids, strict=True):
            if (i, j) != (-1, -1):
                cell = i // kernel + across * (j // kernel)
                cells[cell] = cells.get(cell, 0) + token / kernel**2
        outputs += [cells[cell] for cell in sorted(cells)]
    return torch.stack(outputs)


def ids_of(grids, tokens, shuffle=True):
    """Position ids [B, tokens, 2] of (h, w) grids, padded with -1; the tokens in any order."""
    ids = torch.full((len(grids), tokens, 2), -1)
    for row, (h, w) in zip(ids, grids, strict=True):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        row[: h * w] = torch.stack([x, y], -1).flatten(0, 1)
        if shuffle:
            row[:] = row[torch.randperm(tokens)]
    return ids


CELLS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(CELLS, st.integers(1, 3), st.integers(0, 2), st.integers(0, 4))
def test_batches_of_grids_with_padding(cells, kernel, missing, spare):
    """``missing`` rows are cut off at the bottom, where cells may be incomplete."""
    missing = min(missing, kernel - 1)
    grids = [(h * kernel - missing, w * kernel) for h, w in cells]
    ids = ids_of(grids, max(h * w for h, w in grids) + spare)
    stencil = Stencil.from_position_ids(ids, kernel)
    x = torch.randn(*ids.shape[:2], 3, dtype=torch.double, requires_grad=True)
    p = pool(x.view(1, -1, 3), stencil)
    want = by_cells(x, ids, kernel)
    torch.testing.assert_close(p[0], want, rtol=1e-12, atol=1e-12)
    dp = torch.randn_like(p)
    (dx,), (want_dx,) = (
        torch.autograd.grad(y, x, d, retain_graph=True) for y, d in ((p, dp), (want, dp[0]))
    )
    torch.testing.assert_close(dx, want_dx, rtol=1e-12, atol=1e-12)
    assert stencil.lengths == tuple(h * w for h, w in cells)
    assert stencil.sums_to_one == (missing == 0)


def test_padding_is_left_out_whatever_it_holds():
    ids = ids_of([(2, 4), (4, 4)], 20)
    stencil = Stencil.from_position_ids(ids, 2)
    x = torch.randn(2, 20, 3)
    x[ids[..., 0] < 0] = torch.nan
    x.requires_grad_()
    p = pool(x.view(1, -1, 3), stencil)
    assert p.isfinite().all()
    (dx,) = torch.autograd.grad(p, x, torch.full_like(p, torch.nan))
    assert (dx[ids[..., 0] < 0] == 0).all()


def test_a_grid_of_positions_is_a_grid():
    ids = ids_of([(6, 9)], 54, shuffle=False)[0].int()
    rows, columns = Stencil.from_position_ids(ids, 3).tables()
    for found, want in zip((rows, columns), Stencil.fixed((6, 9), 3).tables(), strict=True):
        assert torch.equal(found.index, want.index)
        torch.testing.assert_close(found.weight, want.weight, rtol=1e-15, atol=0)
        assert not found.ragged


def changed(token, ids):
    """Ids of a 4x4 and a 2x2 grid, the latter padded, and one token of it moved."""
    batch = ids_of([(4, 4), (2, 2)], 16, shuffle=False)
    batch[1, token] = torch.tensor(ids)
    return batch


BAD = {
    "huge": (
        lambda: Stencil.from_position_ids(torch.tensor([[0, 0], [2**63 - 1, 0]]), 1),
        ValueError,
        r"must be \(x, y\) from 0 to 2147483646, or .* for padding: image 0, token 1 has \(92233",
    ),
    "list": (lambda: Stencil.from_position_ids([[0, 0]], 1), TypeError, "must be a tensor"),
    "float": (
        lambda: Stencil.from_position_ids(torch.zeros(1, 2), 1),
        TypeError,
        "position_ids must hold integers, got torch.float32",
    ),
    "device": (
        lambda: Stencil.from_position_ids(torch.zeros(1, 2, dtype=torch.int, device="meta"), 1),
        ValueError,
        "position_ids must be on the CPU, got meta",
    ),
    "shape": (
        lambda: Stencil.from_position_ids(torch.zeros(4, 3, dtype=torch.int), 1),
        ValueError,
        r"position_ids must be \[batch, tokens, 2\] or \[tokens, 2\], got \[4, 3\]",
    ),
    "no tokens": (
        lambda: Stencil.from_position_ids(torch.zeros(2, 0, 2, dtype=torch.int), 1),
        ValueError,
        r"got \[2, 0, 2\]",
    ),
    "kernel": (
        lambda: Stencil.from_position_ids(changed(0, (0, 0)), 0),
        ValueError,
        "kernel must be at least 1, got 0",
    ),
    "negative": (
        lambda: Stencil.from_position_ids(changed(2, (0, -2)), 2),
        ValueError,
        r"or \(-1, -1\) for padding: image 1, token 2 has \(0, -2\)",
    ),
    "half padding": (
        lambda: Stencil.from_position_ids(changed(2, (-1, 1)), 2),
        ValueError,
        r"image 1, token 2 has \(-1, 1\)",
    ),
    "duplicate": (
        lambda: Stencil.from_position_ids(changed(2, (1, 0)), 2),
        ValueError,
        r"must differ within an image: image 1, token 2 has \(1, 0\)",
    ),
    "all padding": (
        lambda: Stencil.from_position_ids(torch.tensor([[[0, 0]], [[-1, -1]]]), 1),
        ValueError,
        "position_ids of image 1 are all padding",
    ),
    "width": (
        lambda: Stencil.from_position_ids(changed(4, (2, 0)), 2),
        ValueError,
        "image 1 is 3 tokens wide, kernel is 2",
    ),
    "out of range": (
        lambda: Stencil.from_position_ids(changed(3, (9, 9)), 2),
        ValueError,
        r"image 1: its 4 tokens cannot fill 25 cells of 2x2; its largest ids are \(9, 9\)",
    ),
    "uncovered": (
        lambda: Stencil.from_position_ids(changed(4, (3, 3)), 2),
        ValueError,
        "image 1 leave an output without tokens: x from 2, y from 0, kernel 2",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_position_ids(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_what_is_no_average_does_not_go_in_front_of_a_bias():
    ids = ids_of([(2, 4), (3, 4)], 12, shuffle=False)  # the second image misses a row
    stencil = Stencil.from_position_ids(ids, 2)
    x, weight, bias = torch.randn(1, 24, 8), torch.randn(5, 8), torch.randn(5)
    assert act_pool_linear(x, weight, None, stencil).shape == (1, 6, 5)
    message = (
        r"pooling in front of a bias needs weights that sum to 1: of image 1 of Stencil\(.*\), "
    )
    with pytest.raises(ValueError, match=message + "those of output 2 sum to 0.5"):
        act_pool_linear(x, weight, bias, stencil)
    padded = Stencil.fixed((4, 6), 3, 3, 1)
    with pytest.raises(ValueError, match=r"those of output 0 sum to 0\.4444"):
        act_pool_linear(x, weight, bias, padded)
    both = Stencil.concat([Stencil.identity(4), Stencil.fixed((4, 5), (1, 2), padding=(0, 1))])
    with pytest.raises(ValueError, match=message + "those of output 0 sum to 0.5"):
        act_pool_linear(x, weight, bias, both)
