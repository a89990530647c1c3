"""Is a packed sequence pooled as its images would be, one by one?"""

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from deco_kernels import Stencil, pool, pool_linear


def one_by_one(x, images, targets, mode, passthrough):
    """Torch's own pooling of every frame [h * w, C] of x [N, C]."""
    parts, at = [], 0
    for (frames, h, w), target in zip(images, targets, strict=True):
        parts.append(x[at : at + passthrough])
        at += passthrough
        grid = x[at : at + frames * h * w].view(frames, h, w, -1).permute(0, 3, 1, 2)
        at += frames * h * w
        if mode == "bilinear":
            p = F.interpolate(grid, size=target, mode="bilinear")
        else:
            p = F.adaptive_avg_pool2d(grid, target)
        parts.append(p.permute(0, 2, 3, 1).flatten(0, 2))
    assert at == len(x)
    return torch.cat(parts)


def compare(stencil, images, targets, mode="adaptive", passthrough=0):
    x = torch.randn(1, stencil.n_in, 3, dtype=torch.double, requires_grad=True)
    p = pool(x, stencil)
    want = one_by_one(x[0], images, targets, mode, passthrough)
    torch.testing.assert_close(p[0], want, rtol=1e-12, atol=1e-12)
    dp = torch.randn_like(p)
    (dx,) = torch.autograd.grad(p, x, dp)
    (want_dx,) = torch.autograd.grad(want, x, dp[0])
    torch.testing.assert_close(dx, want_dx, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close((p * dp).sum(), (x * dx).sum(), rtol=1e-13, atol=1e-12)
    lengths = [passthrough + t * h * w for (t, _, _), (h, w) in zip(images, targets, strict=True)]
    assert list(stencil.lengths) == lengths
    assert stencil.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert stencil.cu_seqlens.dtype == torch.int32
    assert stencil.sums_to_one
    for table in stencil.tables("cpu", torch.float32):
        assert table.index.dtype == torch.int32
        assert table.ragged or (table.weight != 0).all()


SIDE = st.integers(1, 7)
SIZE = st.tuples(SIDE, SIDE)
IMAGES = st.lists(st.tuples(st.integers(1, 3), SIDE, SIDE), min_size=1, max_size=5)
MODE = st.sampled_from(["adaptive", "area", "bilinear"])
quick = settings(deadline=None, max_examples=60)


@quick
@given(IMAGES, SIZE, MODE, st.integers(0, 2), st.booleans())
def test_one_target(images, target, mode, passthrough, as_tensor):
    grids = torch.tensor(images) if as_tensor else images
    stencil = Stencil.packed(grids, target=target, mode=mode, passthrough=passthrough)
    compare(stencil, images, [target] * len(images), mode, passthrough)


@quick
@given(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=5), MODE, st.booleans())
def test_a_target_for_every_image(pairs, mode, as_tensor):
    grids, targets = zip(*pairs, strict=True)
    given_targets = torch.tensor(targets) if as_tensor else list(targets)
    stencil = Stencil.packed(grids, target=given_targets, mode=mode)
    compare(stencil, [(1, h, w) for h, w in grids], targets, mode)


@quick
@given(IMAGES, st.integers(1, 3), st.integers(0, 2))
def test_merge(images, merge, passthrough):
    grids = [(t, h * merge, w * merge) for t, h, w in images]
    stencil = Stencil.packed(grids, merge=merge, passthrough=passthrough)
    compare(stencil, grids, [(h, w) for _, h, w in images], passthrough=passthrough)


@quick
@given(st.lists(st.tuples(SIZE, SIZE), min_size=1, max_size=4), st.integers(1, 3))
def test_concat_is_block_by_block(pairs, tokens):
    parts = [Stencil.identity(tokens)]
    for i, (grid, target) in enumerate(pairs):
        parts.append((Stencil.adaptive if i % 2 else Stencil.bilinear)(grid, target))
    stencil = Stencil.concat(parts)
    x = torch.randn(2, stencil.n_in, 3, dtype=torch.double)
    pieces = x.split([part.n_in for part in parts], 1)
    want = [pool(piece, part) for piece, part in zip(pieces, parts, strict=True)]
    torch.testing.assert_close(pool(x, stencil), torch.cat(want, 1), rtol=1e-12, atol=1e-12)
    assert stencil.lengths == tuple(part.n_out for part in parts)
    again = Stencil.concat([stencil, Stencil.identity(1)])
    assert again.lengths == (stencil.n_out, 1)
    x = torch.randn(1, again.n_in, 3, dtype=torch.double)
    want = torch.cat([pool(x[:, :-1], stencil), x[:, -1:]], 1)
    torch.testing.assert_close(pool(x, again), want, rtol=1e-12, atol=1e-12)


def test_the_same_pack_is_the_same_object():
    grids = [(4, 6), (3, 5), (7, 7)]
    first = Stencil.packed(grids, target=(2, 2))
    assert Stencil.packed(torch.tensor(grids), target=(2, 2)) is first
    assert first.tables()[0] is first.tables()[0]
    assert Stencil.packed(grids, target=(2, 3)) is not first
    for i in range(2, 12):  # they are not kept for ever
        Stencil.packed([(i, i)], target=(2, 2))
    again = Stencil.packed(grids, target=(2, 2))
    assert again is not first
    assert torch.equal(again.tables()[0].index, first.tables()[0].index)


def test_compiled_once_for_packs_of_all_sizes():
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    w = torch.randn(5, 8)
    compiled = torch.compile(pool_linear, fullgraph=True, backend=backend)
    grids = [(9, 9), (5, 5)]
    for _ in range(6):
        grids += torch.randint(4, 9, (2, 2)).tolist()  # every pack is longer, in and out
        stencil = Stencil.packed(grids, target=(2, 3))
        x = torch.randn(1, stencil.n_in, 8, requires_grad=True)
        found, want = (function(x, w, None, stencil) for function in (compiled, pool_linear))
        torch.testing.assert_close(found, want)
        grads = (torch.autograd.grad(z.square().sum(), x) for z in (found, want))
        torch.testing.assert_close(*grads)
    assert len(graphs) <= 3  # for the first pack, and as one size after the other varies


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to wait for")
def test_nothing_waits_for_the_device():
    torch.ones(1).pin_memory()  # starts CUDA
    torch.cuda.set_sync_debug_mode("error")
    try:
        stencil = Stencil.packed([(5, 7), (8, 4)], target=(2, 2), cu_seqlens=[0, 35, 67])
        rows, _ = stencil.tables("cuda", torch.float32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(rows.index.cpu(), stencil.tables("cpu", torch.float32)[0].index)


def test_cu_seqlens_of_images_or_frames():
    grids = [(2, 3, 4), (1, 2, 2), (3, 1, 5)]
    want = Stencil.packed(grids, target=(1, 2))
    for cu_seqlens in (
        [0, 24, 28, 43],
        torch.tensor([0, 24, 28, 43], dtype=torch.int32),
        (0, 12, 24, 28, 33, 38, 43),
    ):
        assert Stencil.packed(grids, target=(1, 2), cu_seqlens=cu_seqlens) is want
    Stencil.packed(grids, target=(1, 2), passthrough=1, cu_seqlens=[0, 25, 30, 46])


GRIDS = [(2, 3), (4, 4)]
BAD = {
    "no images": (lambda: Stencil.packed([], target=(2, 2)), ValueError, "grids must hold an im"),
    "no list": (lambda: Stencil.packed(4, target=(2, 2)), TypeError, "grids must be a list or a"),
    "flat list": (
        lambda: Stencil.packed((4, 4), target=(2, 2)),
        ValueError,
        r"grids\[0\] must be \(height, width\) or \(frames, height, width\), got 4",
    ),
    "four sizes": (
        lambda: Stencil.packed([(4, 4), (1, 2, 3, 4)], target=(2, 2)),
        ValueError,
        r"grids\[1\] must be .* got \(1, 2, 3, 4\)",
    ),
    "empty image": (
        lambda: Stencil.packed([(4, 4), (0, 3)], target=(2, 2)),
        ValueError,
        r"grids\[1\]\[0\] must be at least 1, got 0",
    ),
    "float size": (
        lambda: Stencil.packed([(4, 4), (3.0, 3)], target=(2, 2)),
        TypeError,
        r"grids\[1\]\[0\] must be an int, got float 3.0",
    ),
    "bool size": (
        lambda: Stencil.packed([(4, True)], target=(2, 2)),
        TypeError,
        r"grids\[0\]\[1\] must be an int, got bool True",
    ),
    "float tensor": (
        lambda: Stencil.packed(torch.ones(2, 3), merge=1),
        TypeError,
        "grids must hold integers, got torch.float32",
    ),
    "device tensor": (
        lambda: Stencil.packed(torch.ones(2, 3, dtype=torch.int, device="meta"), merge=1),
        ValueError,
        "grids must be on the CPU, got meta",
    ),
    "neither": (lambda: Stencil.packed(GRIDS), ValueError, "give target or merge, got target=None"),
    "both": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), merge=2),
        ValueError,
        r"give target or merge, got target=\(2, 2\) and merge=2",
    ),
    "mode": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), mode="max"),
        ValueError,
        "mode must be one of adaptive, area, bilinear; got 'max'",
    ),
    "bilinear merge": (
        lambda: Stencil.packed(GRIDS, merge=1, mode="bilinear"),
        ValueError,
        "merge averages windows",
    ),
    "undivided": (
        lambda: Stencil.packed([(4, 4), (6, 5)], merge=2),
        ValueError,
        "merge = 2 must divide the grid of image 1, got 6x5",
    ),
    "no merge": (lambda: Stencil.packed(GRIDS, merge=0), ValueError, "merge must be at least 1"),
    "zero target": (
        lambda: Stencil.packed(GRIDS, target=(2, 0)),
        ValueError,
        r"target\[1\] must be at least 1, got 0",
    ),
    "targets": (
        lambda: Stencil.packed(GRIDS, target=[(2, 2)] * 3),
        ValueError,
        r"target must be \(height, width\), or 2 of them",
    ),
    "a target": (
        lambda: Stencil.packed(GRIDS, target=[(2, 2), (2, 2, 2)]),
        ValueError,
        r"target\[1\] must be \(height, width\), got \(2, 2, 2\)",
    ),
    "passthrough": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), passthrough=-1),
        ValueError,
        "passthrough must be at least 0, got -1",
    ),
    "over int32": (
        lambda: Stencil.packed([(2**16, 2**14)] * 2, target=(1, 1)),
        ValueError,
        "the pack has 2147483648 tokens",
    ),
    "table over int32": (
        lambda: Stencil.packed([(64, 64)] * 601, target=[(1, 1)] + [(64, 64)] * 600),
        ValueError,
        "a table of 2457601 rows, as wide as the widest window of 4096 tokens, has more entries",
    ),
    "cu_seqlens count": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), cu_seqlens=[0, 22]),
        ValueError,
        "cu_seqlens must have one number more than the 2 images, got 2",
    ),
    "cu_seqlens count of frames": (
        lambda: Stencil.packed([(3, 2, 2), (1, 2, 2)], target=(2, 2), cu_seqlens=[0, 12, 14, 16]),
        ValueError,
        "one number more than the 2 images or 4 frames, got 4",
    ),
    "cu_seqlens of floats": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), cu_seqlens=[0.0, 6.0, 22.0]),
        TypeError,
        r"cu_seqlens\[0\] must be an int, got float 0.0",
    ),
    "cu_seqlens start": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), cu_seqlens=[1, 7, 23]),
        ValueError,
        "cu_seqlens must begin with 0, got 1",
    ),
    "cu_seqlens overlap": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), cu_seqlens=[0, 6, 5]),
        ValueError,
        "image 1 with grid 4x4 has 16 tokens, but cu_seqlens goes from 6 to 5",
    ),
    "cu_seqlens of other grids": (
        lambda: Stencil.packed(GRIDS, target=(2, 2), cu_seqlens=torch.tensor([0, 5, 22])),
        ValueError,
        "image 0 with grid 2x3 has 6 tokens, but cu_seqlens goes from 0 to 5",
    ),
    "cu_seqlens on a device": (
        lambda: Stencil.packed(
            GRIDS, target=(2, 2), cu_seqlens=torch.empty(3, dtype=torch.int, device="meta")
        ),
        ValueError,
        "cu_seqlens must be on the CPU",
    ),
    "other tokens": (
        lambda: pool(torch.randn(1, 21, 4), Stencil.packed(GRIDS, target=(2, 2))),
        ValueError,
        r"x has 21 tokens, but Stencil\(packed adaptive, 2 images: 22 -> 8 tokens\) takes 22",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), BAD.values(), ids=BAD.keys())
def test_bad_packs(call, error, message):
    with pytest.raises(error, match=message):
        call()
