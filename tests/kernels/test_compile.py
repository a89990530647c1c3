"""Do the Triton kernels that ship fit the chips? Compiled ahead of time, no GPU needed."""

import dataclasses
import importlib
import json
import re
import subprocess

import pytest
import torch
import triton
from machines.triton import require_products

from deco_kernels.backends import triton as verbs
from deco_kernels.kernels.launch import Chip, Config, stand_in
from deco_kernels.kernels.pool import STEP
from deco_kernels.kernels.resources import SHARED_LIMIT
from deco_kernels.tools import compile as aot
from deco_kernels.tools.compile import triton as jit
from deco_kernels.tuning import table

pytestmark = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="Triton's interpreter compiles nothing"
)

TENSOR_CORE = {80: "mma.sync", 89: "mma.sync", 90: "wgmma", 100: "tcgen05", 120: "mma.sync"}
HEAVIEST = {  # and the kernels they launch
    "bf16 pool 729->196": ["pool"],
    "bf16 gelu 729->196": ["pool_linear"],
    "bf16 dz, g and db": ["dact_linear", "bias_grad"],
    "bf16 elementwise dz, g and db": ["dgelu", "bias_grad"],
}
PRODUCTS = ("pool_linear", "dact_linear")
QUICK = [(case, arch) for arch in (80, 90) for case in HEAVIEST]
QUICK += [("bf16 dz, g and db", 100), ("bf16 dz, g and db", 120)]


def assert_ships(row, arch):
    assert row.arch == arch
    assert row.backend == "triton"
    assert row.spill_bytes == 0, row
    assert 0 < row.registers <= 255
    assert row.shared_bytes <= row.shared_limit == SHARED_LIMIT[arch]
    assert row.tensor_core == (TENSOR_CORE[arch] if row.kernel in PRODUCTS else None)
    assert row.problems == []


@pytest.mark.parametrize(("case", "arch"), QUICK)
def test_the_heaviest_cases_fit(case, arch):
    if not {"pool", "dgelu"} & set(HEAVIEST[case]):
        require_products(arch)
    found = jit.rows(case, arch)
    assert [row.kernel for row in found] == HEAVIEST[case]
    for row in found:
        assert row.case == case
        assert_ships(row, arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", TENSOR_CORE)
def test_every_case_fits(arch):
    require_products(arch)
    found = [row for step in jit.steps([arch]) for row in step.rows]
    assert list(dict.fromkeys(row.case for row in found)) == list(jit.cases())
    assert {row.kernel for row in found} == {k for kernels in HEAVIEST.values() for k in kernels}
    bad = [row for row in found if row.problems]
    assert not bad
    for row in found:
        assert_ships(row, arch)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
def test_there_are_cases_of_every_product(dtype):
    forms = {case.removeprefix(f"{dtype} ") for case in jit.cases() if case.startswith(dtype)}
    shared = {"linear 576->144", "gelu 576->144", "gelu 576->144 inference", "gelu 729->196", "dz"}
    assert shared <= forms
    assert ("autocast gelu 576->144" in forms) == (dtype != "tf32")


def test_compiling_leaves_no_trace():
    precision, driver = torch.backends.cuda.matmul.fp32_precision, jit.driver._active
    assert len(jit.compiled("fp32 pool 576->144 backward", 80)) == 1
    assert torch.backends.cuda.matmul.fp32_precision == precision
    assert jit.driver._active is driver


def use_config(monkeypatch, tiles, warps, stages):
    config = Config(tiles, num_warps=warps, num_stages=stages)
    monkeypatch.setattr(verbs, "config_for", lambda *_: config)


def ptx_of(case, arch):
    """Of the first launch of a case: its PTX and its configuration."""
    first = jit.compiled(case, arch)[0]
    return first.binary.asm["ptx"], first.config


def frame_by_ptxas(ptx, tmp_path):
    """Bytes of stack frame and of spill stores that ptxas itself reports, for sm_80."""
    source = tmp_path / "kernel.ptx"
    source.write_text(ptx)
    command = [triton.knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--regAllocOptLevel=2"]
    command += ["--gpu-name=sm_80", source, "-o", tmp_path / "kernel.cubin"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return tuple(map(int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill", text).groups()))


def test_spills_are_seen_as_ptxas_sees_them(monkeypatch, tmp_path):
    """256 sums a thread do not fit into 255 registers."""
    use_config(monkeypatch, {"PM": 8, "PK": 1024}, 1, 1)
    (row,) = jit.rows("bf16 pool 576->64", 80)
    ptx, _ = ptx_of("bf16 pool 576->64", 80)
    frame, stores = frame_by_ptxas(ptx, tmp_path)
    assert stores > 0
    assert row.spill_bytes == frame > 0
    assert row.problems == [f"spills {frame} bytes"]


def test_no_spill_is_seen_where_ptxas_sees_none(tmp_path):
    (row,) = jit.rows("bf16 pool 729->196", 80)
    ptx, _ = ptx_of("bf16 pool 729->196", 80)
    assert (row.spill_bytes, 0) == frame_by_ptxas(ptx, tmp_path) == (0, 0)


def test_too_much_shared_memory_is_seen(monkeypatch):
    use_config(monkeypatch, {"GROUP": 8, "BM": 64, "BN": 64, "BK": 64}, 4, 8)
    (row,) = jit.rows("bf16 dz", 120)
    assert row.shared_bytes == 7 * 2 * 64 * 64 * 2  # a buffer less than stages, of two tiles
    assert row.problems == [f"{row.shared_bytes} of {99 * 1024} bytes of shared memory"]


def test_a_product_without_tensor_cores_is_seen(monkeypatch):
    use_config(monkeypatch, {"GROUP": 8, "BM": 16, "BN": 32, "BK": 16}, 4, 1)
    kernel = importlib.import_module("deco_kernels.kernels.dact_linear")
    by_ieee = kernel.dact_linear
    monkeypatch.setattr(kernel, "dact_linear", lambda *args: by_ieee(*args[:6], "ieee", *args[7:]))
    (row,) = jit.rows("tf32 dz", 80)
    assert row.tensor_core is None
    assert row.problems == ["no tensor cores"]


def copies(ptx):
    """Bytes of every asynchronous copy to shared memory."""
    return [int(size, 16) for size in re.findall(r"cp\.async\.c[ag].*\], 0x(\w+),", ptx)]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("case", "tokens", "itemsize"),
    [
        ("bf16 pool 576->64", 9, 2),
        ("bf16 pool 729->196", STEP.value, 2),
        ("bf16 pool 576->144 backward", 1, 2),
        ("fp32 pool 576->144", 4, 4),
    ],
)
def test_all_of_the_tokens_come_16_bytes_at_a_time(case, tokens, itemsize, arch):
    ptx, config = ptx_of(case, arch)
    wide = len(re.findall(r"\bld\.global\.v4\.b32\b", ptx))
    assert 16 * wide * 32 * config.num_warps == (
        tokens * config.tiles["PM"] * config.tiles["PK"] * itemsize
    )
    tables = set(re.findall(r"\bld\.global\S*", ptx)) - {"ld.global.v4.b32"}
    assert tables <= {"ld.global.b32"}
    assert set(re.findall(r"\bst\.global\S*", ptx)) == {"st.global.v4.b32"}


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("case", ["bf16 gelu 729->196", "bf16 dz, g and db"])
def test_all_of_the_tiles_come_16_bytes_at_a_time(case, arch):
    require_products(arch)
    ptx, config = ptx_of(case, arch)
    tile = (config.tiles["BM"] + config.tiles["BN"]) * config.tiles["BK"] * 2
    assert set(copies(ptx)) == {16}
    # The loop fetches one tile of either operand; stages - 1 of them are fetched before it.
    assert sum(copies(ptx)) * 32 * config.num_warps == config.num_stages * tile


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        jit.compiled("bf16 dz", 80)


@pytest.mark.parametrize(("archs", "unknown"), [([70], "70"), ([80, 91, 75, 70], "91, 70")])
def test_unknown_archs_are_refused(archs, unknown):
    known = "75, 80, 86, 89, 90, 100, 120"
    with pytest.raises(ValueError, match=f"^unknown arch {unknown}; known are {known}$"):
        aot.table(archs)


def test_limits_are_those_of_the_programming_guide():
    assert {arch: size // 1024 for arch, size in SHARED_LIMIT.items()} == {
        75: 64,
        80: 163,
        86: 99,
        89: 99,
        90: 227,
        100: 227,
        120: 99,
    }


def test_a_row_says_what_the_json_promises():
    promised = "kernel backend arch config registers spill_bytes shared_bytes shared_limit"
    names = [field.name for field in dataclasses.fields(aot.Row)]
    assert names == [*promised.split(), "tensor_core", "case", "compiler"]


@pytest.mark.parametrize("version", ["3.5.1", "3.6.0", "3.7.0", "3.10.0", "4.0.0+git1"])
def test_products_are_left_to_cublas_where_triton_fences_no_loads(monkeypatch, version):
    """wgmma and tcgen05 read what cp.async wrote; mma.sync needs no fence."""
    monkeypatch.setattr(triton, "__version__", version)
    old = version in ("3.5.1", "3.6.0")
    for arch in SHARED_LIMIT:
        with stand_in(Chip(arch, 1), None):
            reason = verbs.no_products(torch.device("meta"))
            assert verbs.fuses(torch.device("meta"), torch.bfloat16) != bool(reason)
        assert bool(reason) == (old and arch in (90, 100))
        assert not reason or reason.startswith(f"Triton {version} puts no fence between loads and")
    assert jit.said_of([80, 90]).count("\n") == old


@pytest.mark.parametrize("arch", [90, 100])
def test_what_multiplies_has_a_fence(arch):
    require_products(arch)
    ptx, _ = ptx_of("bf16 dz", arch)
    assert copies(ptx)
    assert "fence.proxy.async" in ptx


def test_it_says_which_triton_compiled_and_which_chose_the_tiles():
    made = json.loads(table.FILE.read_text())["triton"]
    said = f"Triton kernels by Triton {triton.__version__}, tiles chosen with Triton {made}"
    assert jit.said_of([80]) == said
    assert table.made_with() == made
