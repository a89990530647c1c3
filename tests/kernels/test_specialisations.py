"""How many kernels does Triton compile for images of all sizes? By the JIT's own keys, no GPU."""

import random
from collections import defaultdict

import pytest
import torch
import triton
from machines.triton import launch_keys

from deco_kernels import Stencil
from deco_kernels.backends import triton as verbs
from deco_kernels.kernels import pool as pool_source
from deco_kernels.tools.measure import float32_matmul

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels")
IMAGES, MOST, FEATURES = 300, 4, 256


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def size(most):
    return random.randint(1, most), random.randint(1, most)


def stencils():
    """Of images of any size, pooled by numbers that divide it or to any size; and packs of them."""
    random.seed(1)
    for i in range(IMAGES):
        target = size(16)
        if i % 3 == 0:
            times = size(4)
            yield Stencil.adaptive(tuple(n * t for n, t in zip(target, times, strict=True)), target)
        elif i % 3 == 1:
            yield Stencil.adaptive(size(64), target)
        else:
            images = [size(40) for _ in range(random.randint(1, 3))]
            yield Stencil.packed(images, target=target, passthrough=i % 2)


def calls(stencil, channels, dtype):
    """By name, what a training with images of one size calls."""
    sides, batch = stencil.tables("meta", torch.float32), random.randint(1, 5)
    w, bias = meta(FEATURES, channels, dtype=dtype), meta(FEATURES, dtype=dtype)
    token = 1 if channels % 8 == 0 else 0  # a class token; if not so, x were aligned less than p
    x = meta(batch, stencil.n_in + token, channels, dtype=dtype)[:, token:]
    p = meta(batch, stencil.n_out, channels, dtype=dtype)
    z, v = meta(batch * stencil.n_out, FEATURES, dtype=dtype), meta(64, FEATURES, dtype=dtype)
    dy = meta(len(z), 64, dtype=dtype)
    return {
        "pool": lambda: [verbs.pool(t, s, dtype) for t, s in zip((x, p), sides, strict=True)],
        "pool of gelu": lambda: verbs.pool(x, sides[0], dtype, "gelu"),
        "backward of it": lambda: verbs.dact_pool(p, sides[1], x, "gelu"),
        "pool_linear": lambda: verbs.pool_linear(x, sides[0], w, bias, "gelu", True),
        "pool_linear of gelu": lambda: verbs.pool_linear(x, sides[0], w, None, None, True, "gelu"),
        "dact_linear": lambda: verbs.dact_linear(dy, v, z, True, True),
        "dgelu": lambda: verbs.composed_dact_linear(dy, v, z, True, True),
    }


@pytest.mark.parametrize("channels", [1024, 72, 67])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_grids_compiles_four_kernels_at_most(dtype, channels):
    windows, found = set(), defaultdict(set)
    with float32_matmul("tf32"), launch_keys() as keys:
        for stencil in stencils():
            windows |= {(table.index.shape[1], table.ragged) for table in stencil.tables()}
            for name, call in calls(stencil, channels, dtype).items():
                keys.clear()
                call()
                for kernel, key in keys:
                    found[name, kernel].add(key)
    assert len(windows) > 50
    for (name, kernel), different in found.items():
        most = MOST if kernel.startswith("pool") else 1
        assert len(different) <= most, (name, kernel)


def test_windows_that_most_models_have_are_unrolled():
    def compiled(grid_in, grid_out, side=0):
        table = Stencil.adaptive(grid_in, grid_out).tables()[side]
        return pool_source.compiled_window(table.index, table.ragged)

    assert compiled((24, 24), (12, 12)) == 4
    assert compiled((24, 24), (8, 8)) == 9
    assert compiled((24, 24), (12, 12), side=1) == compiled((5, 5), (5, 5)) == 1
    assert compiled((27, 27), (14, 14)) is compiled((64, 64), (16, 16)) is None
    assert len(pool_source.UNROLLED) + 1 == MOST
