"""Does the cost model count what runs, and do its times follow from what it assumes?"""

import json
from dataclasses import fields, replace

import pytest
import torch
import triton
from machines.triton import require_products, simulated

from deco_kernels import Stencil
from deco_kernels.backends import triton as backend
from deco_kernels.kernels.launch import Config
from deco_kernels.tools.measure import float32_matmul
from deco_kernels.tools.predict import GAIN, holding, report
from deco_kernels.tools.table.rank import candidates
from deco_kernels.tuning import config_for
from deco_kernels.tuning.chips import CHIPS
from deco_kernels.tuning.predict import Assumptions, Predictor
from deco_kernels.tuning.table import override
from deco_kernels.tuning.work import Shape, Traffic, counts

COMPILED = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="needs compiled kernels")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SMS = 2
SHAPES = {  # batch, grid in, grid out, channels, features, dtype
    "one small tile": (1, (4, 4), (2, 2), 64, 128, BF16),
    "overlapping windows, two ragged panels": (3, (9, 9), (7, 7), 160, 208, BF16),
    "two blocks of channels": (2, (6, 6), (3, 3), 272, 144, FP16),
    "TF32, ragged windows": (2, (7, 7), (4, 4), 96, 80, FP32),
    "many columns": (1, (8, 6), (4, 3), 528, 400, BF16),
    "more tokens than before, three panels": (12, (3, 3), (5, 5), 32, 144, FP16),
}
LLAVA = Shape.adaptive(64, (24, 24), (12, 12), 1024, 4096)
SQUARE = Config({"PM": 16, "PK": 256, "BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3)


@pytest.fixture(autouse=True)
def tf32():
    with float32_matmul("tf32"):
        yield


def executed(stats):
    """What a launch did, in the model's terms."""
    found = {"ld": {}, "st": {}}
    for (kind, name), (_, nbytes, sectors) in stats.buffers.items():
        found[kind][name] = Traffic(nbytes, sectors)
    mma = sum(n for name, n in stats.warp_insts.items() if name.startswith("mma.sync"))
    return found["ld"], found["st"], mma


def run_pool_linear(batch, grid_in, grid_out, channels, features, dtype, arch=80):
    table = Stencil.adaptive(grid_in, grid_out).tables("cpu", FP32)[0]
    x = torch.randn(batch, grid_in[0] * grid_in[1], channels).to(dtype)
    # A small Z: every lane takes the same branch of erf. The simulator splits a warp whose lanes
    # do not, and then counts the store that follows once for each part.
    w, bias = torch.randn(features, channels) / 1000, torch.randn(features) / 1000
    with simulated(arch, sms=SMS, race=False) as launches:
        backend.pool_linear(x, table, w.to(dtype), bias.to(dtype), "gelu", True)
    return launches[0]


def totals(loads, stores, mma):
    """For the eye: bytes and sectors of all buffers."""
    read, written = (sum(each.bytes for each in traffic.values()) for traffic in (loads, stores))
    sectors = sum(each.sectors for each in (*loads.values(), *stores.values()))
    return {"bytes_read": read, "bytes_written": written, "sectors": sectors, "mma": mma}


@pytest.fixture
def assert_counted(request, record_property):
    """The model counts what ran. Both are left in a JUnit file, for `deco_kernels report`."""

    def compare(kernel, shape, stats):
        counted = counts(kernel, shape, stats.config, SMS)
        model = counted.loads, counted.stores, counted.mma
        sizes = f"{shape.batch} x {shape.tokens_in} -> {shape.tokens_out}"
        row = {"kernel": kernel, "case": request.node.callspec.id, "tokens": sizes}
        row |= {"channels": shape.channels, "features": shape.features, "dtype": str(shape.dtype)}
        for name, value in totals(*executed(stats)).items():
            row |= {f"executed_{name}": value, f"model_{name}": totals(*model)[name]}
        record_property("counts", json.dumps(row))
        assert executed(stats) == model

    return compare


@COMPILED
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_pool_linear_does_what_the_model_counts(assert_counted, case):
    assert_counted("pool_linear", Shape.adaptive(*case), run_pool_linear(*case))


@COMPILED
@pytest.mark.parametrize("tile", [(128, 128), (64, 256), (128, 256), (256, 128)])
def test_candidates_do_what_the_model_counts(assert_counted, tile):
    shape, configs = SHAPES["overlapping windows, two ragged panels"], candidates("pool_linear", 2)
    config = next(c for c in configs if (c.tiles["BM"], c.tiles["BN"]) == tile)
    with override("pool_linear", 2, config):
        stats = run_pool_linear(*shape)
    assert stats.config is config
    assert_counted("pool_linear", Shape.adaptive(*shape), stats)


@COMPILED
@pytest.mark.parametrize("transposed", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_pool_does_what_the_model_counts(assert_counted, case, transposed):
    batch, grid_in, grid_out, channels, _, dtype = case
    shape = Shape.adaptive(*case, transposed)
    table = Stencil.adaptive(grid_in, grid_out).tables("cpu", FP32)[transposed]
    with simulated(80, race=False) as launches:
        backend.pool(torch.randn(batch, shape.tokens_in, channels).to(dtype), table, dtype)
    assert_counted("pool", shape, launches[0])


@COMPILED
@pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)
def test_dact_linear_does_what_the_model_counts(assert_counted, case):
    shape = Shape.adaptive(*case)
    dy, z = torch.randn(shape.rows, shape.channels), torch.randn(shape.rows, shape.features)
    w = torch.randn(shape.channels, shape.features)
    with simulated(80, race=False) as launches:
        backend.dact_linear(*(t.to(shape.dtype) for t in (dy, w, z)), True, True)
    assert_counted("dact_linear", shape, launches[0])


@COMPILED
@pytest.mark.parametrize(
    ("arch", "tiles"),
    [
        (90, {"PM": 4, "PK": 512, "BM": 128, "BN": 256, "BK": 64}),
        (80, {"PM": 8, "PK": 256, "BM": 64, "BN": 128, "BK": 64}),
    ],
)
def test_other_tiles_and_wgmma_move_the_same_bytes(monkeypatch, arch, tiles):
    """All but the bias, which nobody's time depends on."""
    require_products(arch)
    config = Config(tiles, num_warps=8, num_stages=3)
    monkeypatch.setattr(backend, "config_for", lambda *_: config)
    case = 1, (9, 9), (7, 7), 160, 208, BF16
    loads, stores, mma = executed(run_pool_linear(*case, arch=arch))
    counted = counts("pool_linear", Shape.adaptive(*case), config, SMS)
    total = sum(traffic.sectors for traffic in loads.values())
    bias = loads.pop("bias").sectors - counted.loads.pop("bias").sectors
    assert abs(bias) <= 0.03 * total
    assert (loads, stores) == (counted.loads, counted.stores)
    assert mma == (counted.mma if arch == 80 else 0)


def test_bytes_from_l2_are_those_of_the_tile_plan():
    """[64, 576, 1024] -> [64, 144, 4096]: P 32 times, W 72 times, X once."""
    counted = counts("pool_linear", LLAVA, SQUARE, 132)
    assert counted.l2_to_sm_bytes("p") == 32 * 64 * 144 * 1024 * 2
    assert counted.l2_to_sm_bytes("w") == 72 * 4096 * 1024 * 2
    assert counted.l2_to_sm_bytes("x") == 64 * 576 * 1024 * 2
    assert counted.mma * 2 * 16 * 8 * 16 == LLAVA.flops  # nothing to pad


def h100(**given):
    return Predictor(CHIPS["H100"], Assumptions(**given))


def test_separate_kernels_on_an_h100_take_the_sum_of_product_and_pool():
    """112 us of tensor cores at 70 %, 33 us of DRAM at 85 %; padded waves add little."""
    assert 143 < h100(launch_us=0).peer_forward(LLAVA) < 147


def test_fused_on_an_h100_takes_the_longer_and_a_start_up_if_l2_and_few_leading_panels_let_it():
    """113 to 120 us need a tile that loads less than 128 x 128 from L2, and small pool tasks."""
    predictor, config = h100(launch_us=0), config_for("pool_linear", BF16, 90)
    best, _ = predictor.fused_forward(LLAVA, config)
    assert 113 < best < 120
    assert config.tiles["BN"] == 256
    assert config.tiles["PM"] == 4
    fused, _ = predictor.fused_forward(LLAVA, SQUARE)
    fast_l2, limit = h100(launch_us=0, l2_bytes_per_clock=1000).fused_forward(LLAVA, SQUARE)
    assert limit == "tensor cores"
    assert best + 10 < fast_l2 < fused  # 33 of 72 panels are pooled before the first product


def test_what_a_square_tile_loads_from_l2_on_an_h100_takes_longer_than_its_product():
    """P 32 times, W 72 times; 33 of 72 panels are pooled before that, the rest beside it."""
    pooling, rest = (64 * 576 * 1024 * 2, 64 * 144 * 1024 * 2), 39 / 72
    start = (1 - rest) * sum(pooling) / (3.35e6 * 0.85)
    tables = pooling[0] / 8  # 32 bytes each of index and weight for 512 of X
    loads = 32 * pooling[1] + 72 * 4096 * 1024 * 2 + rest * (pooling[0] + tables)
    expected = start + loads / (132 * 40 * 1.83e3)
    fused, limit = h100(launch_us=0).fused_forward(LLAVA, SQUARE)
    assert limit == "L2"
    assert fused == pytest.approx(expected, rel=0.005)  # the bias and the flags are left out here


def all_times(predictor):
    return [
        predictor.fused_forward(LLAVA, SQUARE)[0],
        predictor.peer_forward(LLAVA),
        predictor.fused_step(LLAVA, SQUARE),
        predictor.torch_step(LLAVA, compiled=False),
        predictor.torch_step(LLAVA, compiled=True),
    ]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("name", [each.name for each in fields(Assumptions)])
def test_a_better_assumption_slows_nothing_and_helps_something(chip, name):
    lowest, highest = next(f for f in fields(Assumptions) if f.name == name).metadata["range"]
    worse, better = (highest, lowest) if name == "launch_us" else (lowest, highest)
    slow, fast = (
        all_times(Predictor(CHIPS[chip], Assumptions(**{name: v}))) for v in (worse, better)
    )
    assert all(a >= b for a, b in zip(slow, fast, strict=True))
    assert slow != fast


def test_compile_saves_one_reading_of_dz():
    saved = h100().torch_step(LLAVA, compiled=False) - h100().torch_step(LLAVA, compiled=True)
    assert saved == pytest.approx(64 * 144 * 4096 * 2 / (3.35e6 * 0.85))


def test_a_step_without_limits_of_memory_is_its_products():
    """Linear 1 forward and dW, linear 2 forward, dG and dW."""
    free = Assumptions(
        launch_us=0, dram_efficiency=1e6, l2_bytes_per_clock=1e6, fused_over_cublas=2
    )
    predictor = Predictor(replace(CHIPS["H100"], sms=128), free)  # whole waves
    rows = 64 * 144
    flops = 2 * rows * 4096 * (2 * 1024 + 3 * 4096)
    expected = flops / (989.4e6 * 0.7)
    assert predictor.torch_step(LLAVA, compiled=False) == pytest.approx(expected, rel=1e-3)
    ours = 2 * rows * 4096 * (1024 + 4096) / (989.4e6 * 0.7)
    assert predictor.fused_step(LLAVA, SQUARE) == pytest.approx(expected - ours / 2, rel=1e-3)


@pytest.mark.parametrize("name", ["gemm_efficiency", "l2_bytes_per_clock", "fused_over_cublas"])
def test_the_gain_is_gone_where_the_sensitivity_says(name):
    chip, config = CHIPS["H200"], config_for("pool_linear", BF16, 90)

    def gain(value):
        return Predictor(chip, Assumptions(**{name: value})).gain(LLAVA, config)

    ((low, high),) = holding(chip, Assumptions(), LLAVA, config, name)
    (edge,) = {low, high} - set(Assumptions.__dataclass_fields__[name].metadata["range"])
    inside = 0.99 if edge == high else 1.01
    assert gain(edge) == pytest.approx(GAIN, abs=1e-4)
    assert gain(edge * inside) > GAIN > gain(edge / inside)
    assert f"{name} {low:.3g} to {high:.3g}" in report(["H200"])


def test_the_report_says_predicted_and_holds_every_assumption():
    text = report(["H100", "L40S"], batch=8, dram_efficiency=0.5)
    assert text.startswith("Predicted microseconds, by the roofline of deco_kernels.tuning.predict")
    assert "[8, 576, 1024] -> [8, 144, 4096]" in text
    lines = {line.split()[0]: line.split()[1] for line in text.splitlines() if line}
    given = {each.name: each.default for each in fields(Assumptions)} | {"dram_efficiency": 0.5}
    assert {name: float(lines[name]) for name in given} == given
    assert report(["H100"]) != report(["H100"], gemm_efficiency=0.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shape.adaptive(1, (4, 4), (2, 2), 72, 128), "16 divides, got 72 and 128"),
        (
            lambda: counts("pool", LLAVA, Config({"PM": 8, "PK": 128}, 4, 1), 132),
            "PK must be 512 bytes",
        ),
        (lambda: Assumptions(gemm_efficiency=0), "gemm_efficiency must be positive, got 0"),
        (lambda: Assumptions(launch_us=-1), "launch_us must be positive, got -1"),
        (lambda: Assumptions(dram_efficiency=float("nan")), "dram_efficiency must be positive"),
        (lambda: report(["H100"], batch=0), "batch must be at least 1, got 0"),
    ],
)
def test_what_the_model_is_not_for_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
