"""Does "auto" take the fastest: as measured, else as predicted, and never by measuring itself?"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from machines.triton import simulated

from deco_kernels import FusedAvgPoolProjector, Stencil, backends
from deco_kernels.backends import Choice
from deco_kernels.host import library, toolchain
from deco_kernels.kernels.launch import Chip
from deco_kernels.tools import tune
from deco_kernels.tools.measure import float32_matmul
from deco_kernels.tuning import cache, chips, decide
from deco_kernels.tuning.call import Call
from deco_kernels.tuning.chips import CHIPS

BF16, CUDA = torch.bfloat16, torch.device("cuda", 0)
FORWARD = Call.pool_linear((64, 576, 1024), (144, 4), (4096, 1024), BF16, True)
BACKWARD = Call.dact_linear(64 * 144, (4096, 4096), BF16)
BUCKET = FORWARD.bucket()
TIMES = {"triton": 30.0, "composed": 20.5, "eager": 40.0}


def properties(name="NVIDIA H100 80GB HBM3", **changed):
    found = {
        "name": name,
        "major": 9,
        "minor": 0,
        "multi_processor_count": 132,
        "clock_rate": 1_980_000,
        "memory_clock_rate": 2_619_000,
        "memory_bus_width": 5120,
        "L2_cache_size": 50 * 2**20,
        "shared_memory_per_block_optin": 227 * 1024,
    }
    return SimpleNamespace(**{**found, **changed})


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine whose device 0 is what `gpu(...)` says, with Triton and an empty cache."""

    def become(name="NVIDIA H100 80GB HBM3", **changed):
        device = properties(name, **changed)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        for kept in (chips.figures_of, cache.load, decide.ranking):
            kept.cache_clear()

    monkeypatch.setenv("DECO_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "preferred", lambda device, dtype: Choice("triton", "it is here"))
    monkeypatch.setattr(backends.triton, "unfenced", lambda arch: None)  # whatever Triton is here
    become()
    yield become
    for kept in (chips.figures_of, cache.load, decide.ranking):
        kept.cache_clear()


def test_calls_of_one_bucket_are_alike():
    def call(images):
        return Call.pool_linear((images, 576, 1024), (144, 4), (4096, 1024), BF16, True)

    assert call(57).bucket() == call(64).bucket() == call(113).bucket() != call(114).bucket()
    assert {call(i).bucket().rows for i in range(200)} == {2**n for n in range(7, 16)}
    assert [call(i).rows for i in (0, 1, 8)] == [128, 256, 1152]  # the model knows of panels


def test_what_was_measured_decides(gpu):
    assert backends.fastest(CUDA, FORWARD).backend == "triton"
    cache.store(0, {FORWARD.bucket(): TIMES, BACKWARD.bucket(): {"triton": 2.0, "eager": 1.0}})
    decide.ranking.cache_clear()
    choice = backends.fastest(CUDA, FORWARD)
    assert choice == ("composed", "measured microseconds: composed 20.5, triton 30, eager 40")
    assert backends.fastest(CUDA, BACKWARD).backend == "eager"
    other = FORWARD._replace(features=2048)
    assert backends.fastest(CUDA, other).reason.startswith("predicted microseconds: ")


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("call", [FORWARD, BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("rows", [128, 1152, 16384])
def test_the_model_decides_where_nothing_was_measured(gpu, chip, call, rows):
    gpu(chip.driver_name)
    call = call._replace(rows=rows)
    times = decide.predicted(chip, "triton", call)
    assert set(times) == {"triton", "composed", "eager"}
    assert backends.fastest(CUDA, call).backend == min(times, key=times.get)


def test_the_model_says_that_fusion_does_not_pay_on_a_b200(gpu):
    gpu("NVIDIA B200")
    assert backends.fastest(CUDA, FORWARD).backend == "composed"
    assert backends.fastest(CUDA, BACKWARD).backend == "composed"
    gpu()
    assert backends.fastest(CUDA, FORWARD).backend == "triton"


def test_without_a_model_for_it_the_fused_kernel_is_not_taken(gpu):
    odd = FORWARD._replace(features=4090)
    assert set(decide.predicted(CHIPS["H100"], "triton", odd)) == {"composed", "eager"}
    assert "cuda" not in decide.predicted(CHIPS["H100"], "cuda", FORWARD)  # no wgmma
    assert "cuda" not in decide.predicted(CHIPS["A100"], "cuda", BACKWARD)  # cuBLAS's product
    assert "cuda" in decide.predicted(CHIPS["A100"], "cuda", FORWARD)
    gpu("A chip of tomorrow", major=13, minor=0)
    assert backends.fastest(CUDA, FORWARD) == (
        "composed",
        "nothing is known of this GPU, or of who can run here",
    )


def test_what_the_driver_says_of_an_unlisted_chip(gpu):
    gpu("NVIDIA H100 PCIe", multi_processor_count=114, clock_rate=1_755_000)
    chip = chips.figures_of(0)
    assert chip.bf16_tflops == pytest.approx(114 * 1.755 * 4.096)
    assert chip.dram_tb_s == pytest.approx(3.35, rel=0.01)
    assert (chip.arch, chip.l2_mb, chip.shared_kb) == (90, 52, 227)
    gpu("NVIDIA GeForce RTX 4080", major=8, minor=9, multi_processor_count=76, clock_rate=2_505_000)
    assert chips.figures_of(0).bf16_tflops == pytest.approx(97.5, rel=0.01)
    gpu("of an older torch", clock_rate=0)
    assert chips.figures_of(0) is None
    gpu("NVIDIA H200")
    assert chips.figures_of(0) is CHIPS["H200"]


def test_a_measured_cuda_kernel_is_taken_only_if_it_is_built(gpu, monkeypatch):
    cache.store(0, {BUCKET: {"cuda": 1.0, "composed": 2.0}})
    monkeypatch.setattr(backends.get("cuda"), "unusable", lambda device, dtype: None)
    monkeypatch.setattr(backends, "chip_of", lambda device: Chip(90, 132))
    for built in (True, False):
        monkeypatch.setattr(library, "built", lambda arch, built=built: built)
        assert backends.fastest(CUDA, FORWARD).backend == ("cuda" if built else "composed")


def test_activated_tokens_are_another_call(gpu):
    """Plain measurements say nothing of them; eager copies the tokens to activate them."""
    act = Call.pool_linear((64, 576, 1024), (144, 4), (4096, 1024), BF16, False, "silu")
    plain = act._replace(act=None)
    cache.store(0, {plain.bucket(): TIMES})
    assert backends.fastest(CUDA, plain).backend == "composed"
    assert backends.fastest(CUDA, act).reason.startswith("predicted")
    times = [decide.predicted(CHIPS["H100"], "triton", call) for call in (plain, act)]
    assert times[0]["eager"] < times[1]["eager"]
    assert str(act).startswith("pool_linear of silu bfloat16")


def test_the_cuda_kernel_is_predicted_with_its_own_tiles(gpu):
    """One image on an RTX 4090: two panels of 128 x 128 tiles leave SMs idle, 64 x 128 does not."""
    call = FORWARD._replace(rows=256)
    triton, cuda = (decide.predicted(CHIPS["RTX4090"], who, call) for who in ("triton", "cuda"))
    assert triton["triton"] < cuda["composed"] < cuda["cuda"]


def test_float32_by_ieee_rules_has_nothing_to_choose(gpu):
    call = FORWARD._replace(dtype=torch.float32)
    with float32_matmul("ieee"):
        assert backends.fastest(CUDA, call) == ("triton", "only triton has kernels for it")
    with float32_matmul("tf32"):
        assert backends.fastest(CUDA, call).reason.startswith("predicted")


@pytest.mark.parametrize("winner", ["triton", "composed", "eager"])
def test_the_operators_run_what_wins(monkeypatch, winner):
    monkeypatch.setattr(backends, "fastest", lambda device, call: Choice(winner, "of a test"))
    monkeypatch.setattr(backends, "preferred", lambda device, dtype: Choice("triton", "of a test"))
    places = Stencil.adaptive((4, 4), (2, 2)).places(torch.device("cpu"), torch.half)
    x, w, z = (torch.randn(*s).half() for s in ((2, 16, 64), (64, 64), (8, 64)))
    with simulated(80) as launches:
        operators = torch.ops.deco_kernels
        p, _, g = operators.pool_linear(x, *places, w, None, None, "gelu", True, None, "auto")
        _, again, _ = operators.dact_linear(z, w, z, True, True, "auto")
        pooled = operators.pool(x, *places, False, torch.half, "auto")
    kernels = [stats.kernel.removesuffix("_kernel") for stats in launches]
    assert (
        kernels
        == {
            "triton": ["pool_linear", "dact_linear", "bias_grad", "pool"],
            "composed": ["pool", "dgelu", "bias_grad", "pool"],
            "eager": ["pool"],
        }[winner]
    )
    assert torch.equal(p, pooled)
    gelu = torch.nn.functional.gelu
    torch.testing.assert_close(g, gelu(p @ w.T), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(again, gelu(z), rtol=1e-2, atol=1e-2)


def test_explain_says_who_and_why(gpu, monkeypatch):
    cache.store(0, {BUCKET: TIMES})
    fused = FusedAvgPoolProjector(2, 144, 1024, 4096).to("meta", BF16)
    monkeypatch.setattr("deco_kernels.projector.choose", lambda *_: Choice("auto", "it is here"))
    monkeypatch.setattr(
        "deco_kernels.projector.fastest", lambda device, call: backends.fastest(CUDA, call)
    )
    assert fused.explain().backend == "auto"
    plan = fused.explain(torch.empty(64, 576, 1024, device="meta", dtype=BF16))
    assert plan.backend == "composed"
    assert "4 tokens to one: composed (measured microseconds: composed 20.5" in plan.reason
    assert "dact_linear and gelu bfloat16 [9216, 4096] -> [9216, 4096]: triton" in plan.reason
    wide = torch.empty(1, 512, 1024, device="meta", dtype=BF16)
    assert fused.explain(wide, grid=(16, 32)).path == "fused"


def damage(**changed):
    def write(content):
        content["key"].update(changed)
        return json.dumps(content)

    return write


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda content: "{", "corrupt"),
        (lambda content: "[1, 2]", "corrupt"),
        (lambda content: json.dumps({"key": content["key"]}), "corrupt"),
        (lambda content: json.dumps(content).replace("20.5", "-1"), "corrupt"),
        (lambda content: json.dumps(content).replace("20.5", '"fast"'), "corrupt"),
        (lambda content: json.dumps(content).replace("bfloat16", "int99"), "corrupt"),
        (lambda content: json.dumps(content).replace("16384", '"many"'), "corrupt"),
        (lambda content: json.dumps({**content, "key": []}), "for format None"),
        (lambda content: json.dumps({**content, "key": 3}), "corrupt"),
        (damage(torch="1.13.0"), "for torch 1.13.0, this is"),
        (damage(device="NVIDIA V100"), "for device NVIDIA V100"),
        (damage(format=99), "for format 99"),
    ],
)
def test_a_corrupt_or_foreign_file_is_ignored_with_one_warning(gpu, write, reason):
    file = cache.store(0, {BUCKET: TIMES})
    file.write_text(write(json.loads(file.read_text())))
    with pytest.warns(UserWarning, match=f"is ignored: it is .*{reason}.* tune` writes a new"):
        assert cache.load(0) == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.fastest(CUDA, FORWARD).backend == "triton"
    cache.store(0, {BACKWARD: TIMES})
    assert cache.load(0) == {BACKWARD: TIMES}


def test_storing_adds_and_leaves_no_other_files(gpu):
    cache.store(0, {BUCKET: TIMES})
    file = cache.store(0, {BACKWARD: TIMES, BUCKET: {"eager": 5.0}})
    assert cache.load(0) == {BUCKET: {"eager": 5.0}, BACKWARD: TIMES}
    assert {f.name for f in file.parent.iterdir()} <= {file.name, f"{file.name}.lock"}
    assert re.fullmatch(r"NVIDIA-H100-80GB-HBM3-[0-9a-f]{12}\.json", file.name)


def test_environments_share_a_folder(gpu, monkeypatch):
    cache.store(0, {BUCKET: TIMES})
    monkeypatch.setattr(torch, "__version__", "9.0")
    cache.load.cache_clear()
    assert cache.load(0) == {}
    cache.store(0, {BUCKET: {"eager": 5.0}})
    assert len(list(cache.folder().glob("*.json"))) == 2


@pytest.mark.parametrize("folder", [Path(cache.kernels.__file__).parent, toolchain.folder()])
def test_other_kernels_have_not_been_measured(gpu, monkeypatch, tmp_path, folder):
    """Of a checkout the version stays the same while its kernels change."""
    cache.store(0, {BUCKET: TIMES})
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    with next(copy.glob("pool_linear.*")).open("a") as file:
        file.write("\n")
    if folder == toolchain.folder():
        monkeypatch.setattr(toolchain, "folder", lambda: copy)
    else:
        monkeypatch.setattr(cache.kernels, "__file__", str(copy / "__init__.py"))
    monkeypatch.setattr(cache, "_kernels", cache._kernels.__wrapped__)
    cache.load.cache_clear()
    assert cache.load(0) == {}


def test_without_a_home_nothing_was_measured(gpu, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DECO_KERNELS_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(cache.Path, "expanduser", homeless)
    assert cache.load(0) == {}
    assert backends.fastest(CUDA, FORWARD).backend == "triton"


def test_a_killed_writer_leaves_the_old_file(gpu, monkeypatch):
    cache.store(0, {BUCKET: TIMES})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        cache.store(0, {BUCKET: {"eager": 5.0}})
    cache.load.cache_clear()
    assert cache.load(0) == {BUCKET: TIMES}


def test_no_file_is_no_reason_to_warn(gpu):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache.load(0) == {}


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv("DECO_KERNELS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "deco_kernels"


def test_tune_measures_stores_and_auto_obeys(gpu, monkeypatch, capsys):
    """On the CPU, with one backend: the times are those of the host."""
    cpu = torch.device("cpu", 0)
    monkeypatch.setattr(tune, "_gpu", lambda device: cpu)
    monkeypatch.setattr(tune, "unusable", lambda backend, *_: None)

    def prepare(device):
        raise RuntimeError("no compiler\nand a long story")

    monkeypatch.setattr(backends.get("cuda"), "prepare", prepare)
    calls = []

    def verbs(backend):
        if backend == "cuda":
            return backends.get("cuda")
        calls.append(backend)
        return backends.get("eager")

    monkeypatch.setattr(tune, "get", verbs)
    tune.run((16, 16), 64, 16, 32, batch=(1, 2, 4, 5, 8), dtype="tf32")
    rounds = 6 * (tune.WARMUP + tune.ROUNDS)  # two verbs, three buckets of rows
    assert {b: calls.count(b) for b in calls} == dict.fromkeys(
        ("triton", "composed", "eager"), rounds
    )
    assert calls[:6] == ["triton", "composed", "eager", "composed", "eager", "triton"]
    stored = cache.load(0)
    assert {(call.verb, call.rows) for call in stored} == {
        (verb, rows) for verb in ("pool_linear", "dact_linear") for rows in (128, 256, 512)
    }
    out = capsys.readouterr().out
    assert "skip cuda: no compiler\n" in out
    assert str(cache.path(0)) in out
    call = next(iter(stored))
    with float32_matmul("tf32"):
        assert backends.fastest(CUDA, call).backend == min(stored[call], key=stored[call].get)


def test_a_dry_run_prints_the_plan_and_touches_nothing(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DECO_KERNELS_CACHE_DIR", str(tmp_path / "none"))
    tune.run((27, 27), 196, 1152, 3584, layer_num=3, batch=(2,), dry_run=True)
    out = capsys.readouterr().out
    assert "pool_linear [2, 729, 1152], pooled to 196 -> 3584" in out
    assert out.count("dact_linear [1, 392, 3584] -> 3584") == 1
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": (0,)}, ValueError, "batch must be at least 1, got 0"),
        ({"query_num": 5}, ValueError, "query_num must be a positive square number, got 5"),
        ({"dtype": "float64"}, ValueError, "dtype must be one of bfloat16, float16, tf32"),
        ({"device": "cpu"}, RuntimeError, "tune needs a CUDA device, got cpu"),
        ({"device": "cuda:9"}, RuntimeError, "tune needs a CUDA device, got cuda:9, there are"),
        ({"batch": ()}, ValueError, "batch must name at least one"),
    ],
)
def test_tune_refuses(options, error, message):
    with pytest.raises(error, match=message):
        tune.run(**options)
