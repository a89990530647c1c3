"""What do the compiled kernels read and write? Sectors, access widths, bank conflicts, counted."""

import json

import pytest
import torch
import triton
import triton.language as tl
from machines.triton import require_products, simulated
from ptxsim import run_triton
from torch.utils._python_dispatch import TorchDispatchMode

from deco_kernels import FusedAvgPoolProjector, Stencil, ops
from deco_kernels.backends import triton as backend
from deco_kernels.kernels.launch import Chip, stand_in
from deco_kernels.tuning import config_for

pytestmark = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels")
SECTOR = 32
BF16 = torch.bfloat16


def pool_linear_counts(arch, batch, channels, features):
    """One launch at 576 -> 144 tokens with GELU, as in training."""
    require_products(arch)
    x, w = torch.randn(batch, 576, channels).to(BF16), torch.randn(features, channels).to(BF16)
    rows, _ = Stencil.adaptive((24, 24), (12, 12)).tables("cpu", torch.float32)
    with simulated(arch, race=False) as launches:
        backend.pool_linear(x, rows, w, torch.randn(features).to(BF16), "gelu", True)
    return launches[0]


@pytest.mark.parametrize("arch", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_bytes_read_by_one_launch_are_those_of_the_tile_plan(arch):
    """[8, 576, 1024] -> [8, 144, 4096]: X once, P once a column of tiles, W once a panel."""
    batch, channels, features = 8, 1024, 4096
    stats = pool_linear_counts(arch, batch, channels, features)
    tiles = config_for("pool_linear", BF16, arch).tiles
    m = batch * 144
    panels, columns = triton.cdiv(m, tiles["BM"]), triton.cdiv(features, tiles["BN"])
    plan = {
        ("ld", "x"): batch * 576 * channels * 2,
        ("ld", "p"): columns * m * channels * 2,
        ("ld", "w"): panels * features * channels * 2,
        ("st", "p"): m * channels * 2,
        ("st", "z"): m * features * 2,
        ("st", "g"): m * features * 2,
    }
    for key, nbytes in plan.items():
        assert stats.buffers[key][1] == nbytes, key
        assert stats.buffers[key][2] * SECTOR == nbytes, key  # fully coalesced
    everything = sum(
        sectors for (kind, _), (_, _, sectors) in stats.buffers.items() if kind == "ld"
    )
    planned = sum(nbytes for (kind, _), nbytes in plan.items() if kind == "ld")
    assert planned <= everything * SECTOR <= 1.02 * planned  # with tables, bias, flags


@pytest.mark.parametrize("arch", [80, 90])
def test_accesses_are_16_bytes_and_coalesced(arch):
    stats = pool_linear_counts(arch, 1, 256, 256)
    for name in "xpw":
        requests, nbytes, sectors = stats.buffers["ld", name]
        assert nbytes == sectors * SECTOR
        assert nbytes == requests * 32 * 16, name


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_pool_and_unpool_read_once_in_16_bytes(arch, side):
    table = Stencil.adaptive((24, 24), (12, 12)).tables("cpu", torch.float32)[side == "columns"]
    tokens = 576 if side == "rows" else 144
    x = torch.randn(2, tokens, 1024).to(BF16)
    with simulated(arch) as launches:
        p = backend.pool(x, table, BF16)
    requests, nbytes, sectors = launches[0].buffers["ld", "x"]
    assert nbytes == sectors * SECTOR == requests * 32 * 16
    assert nbytes == p.numel() * 2 * table.index.shape[1]
    assert launches[0].buffers["st", "p"][2] * SECTOR == p.numel() * 2


@triton.jit
def matmul(p, w, z, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """A plain Triton matmul, z = p wᵀ, to compare shared-memory traffic with."""
    rm, rn = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    rk = tl.arange(0, BK)
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, K, BK):
        a = tl.load(p + rm[:, None] * K + k + rk[None, :])
        b = tl.load(w + rn[None, :] * K + k + rk[:, None])
        acc = tl.dot(a, b, acc)
    tl.store(z + rm[:, None] * N + rn[None, :], acc.to(z.dtype.element_ty))


def conflicts(stats):
    """Shared-memory wavefronts beyond the conflict-free minimum."""
    return sum(waves - ideal for _, waves, ideal in stats.shared.values())


@pytest.mark.parametrize("arch", [80, 90])
def test_no_more_bank_conflicts_than_a_plain_matmul(arch):
    require_products(arch)
    config = config_for("pool_linear", BF16, arch)
    tiles = {name: config.tiles[name] for name in ("BM", "BN", "BK")}
    m, n = tiles["BM"], tiles["BN"]
    p, w = torch.randn(m, 256).to(BF16), torch.randn(n, 256).to(BF16)
    args = {"p": p, "w": w, "z": torch.empty(m, n, dtype=BF16), "M": m, "N": n, "K": 256}
    plain = run_triton(
        matmul,
        (1, 1),
        args,
        tiles,
        target_sm=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert conflicts(pool_linear_counts(arch, 1, 256, n)) <= conflicts(plain)
    if backend.unfenced(90):
        return  # before 3.7 Triton's own sum over rows has some, once a tile: not in the loop
    dy, z = torch.randn(128, 256).to(BF16), torch.randn(128, 256).to(BF16)
    with simulated(arch) as launches:
        backend.dact_linear(dy, torch.randn(256, 256).to(BF16), z, True, True)
    assert conflicts(launches[0]) <= conflicts(plain)


class Count(TorchDispatchMode):
    """Names the operators that compute; an operator of ours is opened up."""

    FREE = (
        "detach",
        "view",
        "_unsafe_view",
        "t",
        "permute",
        "empty",
        "empty_like",
        "new_empty",
        "zeros",
        "reshape",
        "numpy_T",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        library, name = func.name().split(".")[0].split("::")
        if library == "deco_kernels":
            with self:
                return getattr(ops, f"_{name}")(*args)
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trained_tower", "bar"), [(False, 5), (True, 7)])
def test_launches_of_a_training_step(record_property, trained_tower, bar):
    """Two layers: forward 2, backward at most 5 with a frozen tower; ours and torch's."""
    fused = FusedAvgPoolProjector(2, 4, 64, 64, backend="triton").to(BF16)
    x = torch.randn(1, 16, 64).to(BF16).requires_grad_(trained_tower)
    dy = torch.randn(1, 4, 64).to(BF16)
    launches = []
    with stand_in(Chip(80, 2), lambda kernel, *_: launches.append(kernel.__name__)):
        fused(x)  # builds the tables
        launches.clear()
        with Count() as forward:
            y = fused(x)
        assert launches == ["pool_linear_kernel"]
        assert forward.names == ["linear"]  # of contiguous tokens: one addmm
        launches.clear()
        with Count() as backward:
            torch.autograd.grad(y, [p for p in (x, *fused.parameters()) if p.requires_grad], dy)
    row = {"tower": "trained" if trained_tower else "frozen", "forward": 1 + len(forward.names)}
    row["backward"] = len(launches) + len(backward.names)
    record_property("launches", json.dumps(row))  # for `deco_kernels report`
    kernels = ["dact_linear_kernel", "bias_grad_kernel"] + ["pool_kernel"] * trained_tower
    assert launches == kernels
    assert sorted(backward.names) == ["mm"] * (2 + trained_tower) + ["sum"]
    assert row["backward"] <= bar
