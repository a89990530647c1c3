"""Do the CUDA C++ kernels fit the chips? Compiled ahead of time, no GPU needed."""

import re
import shutil
import subprocess

import pytest

from deco_kernels.host import toolchain
from deco_kernels.kernels.resources import SHARED_LIMIT
from deco_kernels.tools import compile as aot
from deco_kernels.tools.compile import cuda

compiles = pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc was not found")

STAGES = 3 * (128 + 128) * 64 + 16  # bytes: tiles of 128 rows and 128 columns, and the ticket
SHARED = {
    **{("pool", case): 0 for case in ("bf16", "fp16", "fp32")},
    **{("pool_linear", case): STAGES for case in ("bf16", "fp16", "tf32")},
    **{("dgelu", case): 8 * 32 * 8 * 4 for case in ("bf16", "fp16")},
    ("dgelu", "fp32"): 8 * 32 * 4 * 4,  # warps, lanes, columns of a lane, bytes
}
BEFORE_SM80 = [*(("pool", c) for c in ("fp16", "fp32")), ("pool_linear", "fp16")]
BEFORE_SM80 += [("dgelu", case) for case in ("fp16", "fp32")]
CONFIG = {
    "pool": "128 threads",
    "pool_linear": "128x128, 3 stages, 256 threads",
    "dgelu": "256 threads",
}
LINE = r"sm_{}: all 4 CUDA files to cubins in (\S+) s of wall time, \d+ at a time; (\d+) KiB"


def slow(arch):
    return pytest.param(arch, marks=pytest.mark.slow)


@compiles
@pytest.mark.parametrize("arch", [80, *map(slow, (75, 86, 89, 90, 100, 120))])
def test_all_that_ships_fits(arch):
    (step,) = cuda.steps([arch])
    found = sorted((row.kernel, row.case) for row in step.rows)
    assert found == sorted(SHARED if arch >= 80 else BEFORE_SM80)
    for row in step.rows:
        assert (row.backend, row.arch, row.config) == ("cuda", arch, CONFIG[row.kernel])
        assert row.spill_bytes == 0, row
        assert 0 < row.registers <= 255
        assert row.shared_bytes == SHARED[row.kernel, row.case]
        assert row.shared_bytes <= row.shared_limit == SHARED_LIMIT[arch]
        assert row.tensor_core == ("mma.sync" if row.kernel == "pool_linear" else None)
        assert row.problems == []
        if row.kernel == "pool_linear" and arch >= 80:  # two blocks fit into an SM
            assert 2 * 256 * row.registers <= 65536
            assert 2 * (row.shared_bytes + 1024) <= row.shared_limit + 1024  # 1 KiB a block more
    seconds, size = re.fullmatch(LINE.format(arch), step.line).groups()
    assert float(seconds) > 0
    assert 100 < int(size) < 1000


@compiles
def test_a_row_says_what_cuobjdump_says(tmp_path):
    cubin = tmp_path / "dgelu.cubin"
    command = [toolchain.nvcc(), "-std=c++17", "-O3", "-arch=sm_80", "-cubin"]
    subprocess.run([*command, toolchain.folder() / "dgelu.cu", "-o", cubin], check=True)
    triton = pytest.importorskip("triton")
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)"
    said = {cuda.name_of(name): tuple(map(int, sizes)) for name, *sizes in re.findall(usage, text)}
    assert len(said) == 3
    assert said == {
        (row.kernel, row.case): (row.registers, row.spill_bytes, row.shared_bytes)
        for row in cuda.rows(cuda.compiled("dgelu.cu", 80), 80)
    }


@compiles
def test_sm_75_has_neither_bf16_nor_tf32():
    done = cuda.compiled("dgelu.cu", 75)
    rows = cuda.rows(done, 75)
    assert [row.case for row in rows] == ["fp16", "fp32"]
    assert {row.shared_limit for row in rows} == {65536}
    assert [row.case for row in cuda.rows(done, 80)] == ["bf16", "fp16", "fp32"]


@pytest.fixture
def change(tmp_path, monkeypatch):
    """Change a line of a copy of the sources, which then is what is compiled."""
    copy = shutil.copytree(toolchain.folder(), tmp_path / "csrc")
    monkeypatch.setattr(toolchain, "folder", lambda: copy)

    def replace(name, old, new):
        text = (copy / name).read_text()
        assert text.count(old) == 1
        (copy / name).write_text(text.replace(old, new))

    return replace


def numbers_of_ptxas(report):
    """Bytes of stack frame, spill stores and spill loads of every kernel."""
    line = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    return [tuple(map(int, numbers)) for numbers in re.findall(line, report)]


@compiles
def test_spills_and_too_much_shared_memory_are_seen(change):
    change("pool_linear.cu", "__launch_bounds__(THREADS, DECO_SM80 ? 2 : 1)", "LAUNCH_BOUNDS")
    change("pool_linear.cu", "LAUNCH_BOUNDS", "__launch_bounds__(THREADS, 4)")
    change("pool_linear.cu", "int STAGES = 3", "int STAGES = 7")
    change("pool_linear.cu", "SHARED_BYTES = 49168", "SHARED_BYTES = 114704")
    done = cuda.compiled("pool_linear.cu", 86)
    rows, numbers = cuda.rows(done, 86), numbers_of_ptxas(done.report)
    for row, (frame, stores, loads) in zip(rows, numbers, strict=True):
        assert min(stores, loads) > 0
        assert row.spill_bytes == frame > 0
        assert row.config == "128x128, 7 stages, 256 threads"
        memory = f"{7 * 256 * 64 + 16} of {99 * 1024} bytes of shared memory"
        assert row.problems == [f"spills {frame} bytes", memory]


@compiles
def test_a_product_without_tensor_cores_is_seen(change):
    change("ptx.h", "#define DECO_SM80 1", "#define DECO_SM80 0")
    found = {row.case: row for row in cuda.rows(cuda.compiled("pool_linear.cu", 80), 80)}
    assert found["fp16"].tensor_core == "mma.sync"
    assert found["fp16"].problems == []
    for case in ("bf16", "tf32"):
        assert found[case].tensor_core is None
        assert found[case].problems == ["no tensor cores"]


@pytest.mark.parametrize(
    ("line", "spills"),
    [
        ("24 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads", 24),
        ("0 bytes stack frame, 0 bytes spill stores, 4 bytes spill loads", 4),
        ("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", 0),
        (
            "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
            "ptxas info    : Used 34 registers, used 1 barriers, 40 bytes cumulative stack size",
            40,
        ),
    ],
)
def test_spills_in_any_place_are_seen(line, spills):
    symbol = "_ZN4deco11pool_kernelINS_4HalfEEEvNS_6ParamsE"
    ptx = f".visible .entry {symbol}(\n)\n.maxntid 128, 1, 1\n"
    report = f"ptxas info    : Compiling entry function '{symbol}' for 'sm_80'\n    {line}\n"
    (row,) = cuda.rows(cuda.Compiled("pool.cu", ptx, report, 0), 80)
    assert row.spill_bytes == spills
    assert row.config == "128 threads"


@compiles
@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ("__launch_bounds__(4096, 8)", r"ptxas error .* out of range.* ignored$"),
        ("__nonsense__", r"pool\.cu\(\d+\): error: .*"),
    ],
)
def test_what_nvcc_refuses_is_one_line(change, replaced, message):
    change("pool.cu", "__launch_bounds__(32 * WARPS, 8)", replaced)
    with pytest.raises(RuntimeError, match=f"^nvcc failed for sm_80: .*{message}") as error:
        cuda.compiled("pool.cu", 80)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN4deco18pool_linear_kernelINS_6BfloatEEEvNS_6ParamsE", ("pool_linear", "bf16")),
        ("_ZN4deco18pool_linear_kernelINS_4HalfEEEvNS_6ParamsE", ("pool_linear", "fp16")),
        ("_ZN4deco18pool_linear_kernelINS_5FloatEEEvNS_6ParamsE", ("pool_linear", "tf32")),
        ("_ZN4deco11pool_kernelINS_5FloatEEEvNS_6ParamsE", ("pool", "fp32")),
        ("_ZN4deco12dgelu_kernelINS_6BfloatEEEvNS_6ParamsE", ("dgelu", "bf16")),
    ],
)
def test_a_symbol_is_a_kernel_and_a_case(symbol, name):
    assert cuda.name_of(symbol) == name


@pytest.mark.parametrize(
    "symbol",
    [
        "_ZN4deco11pool_kernelINS_6DoubleEEEvNS_6ParamsE",
        "_ZN4deco11pool_kernelINS_5FloatELi4EEEvNS_6ParamsE",
        "memset_kernel",
    ],
)
def test_no_other_symbol_is(symbol):
    with pytest.raises(RuntimeError, match=f"^{symbol} is not the name of a kernel"):
        cuda.name_of(symbol)


@pytest.fixture
def all_possible(monkeypatch, jit):
    for module in (cuda, jit):
        monkeypatch.setattr(module, "problem", lambda arch: None)


@pytest.mark.parametrize(
    ("archs", "for_cuda", "for_triton"),
    [(None, 7, 5), ([75], 1, 0), ([75, 86], 2, 1), ([80, 90, 100, 120], 4, 4)],
)
def test_a_table_is_of_both_backends(all_possible, jit, archs, for_cuda, for_triton):
    table = aot.table(archs)
    assert table.total == for_cuda + for_triton * len(jit.cases())
    assert table.notes == []


def test_the_steps_of_a_table_are_cudas_then_tritons(all_possible, jit, monkeypatch):
    for name, module in (("cuda", cuda), ("triton", jit)):
        monkeypatch.setattr(module, "steps", lambda archs, name=name: iter([(name, archs)]))
    steps = aot.table([75, 90]).steps
    assert list(steps) == [("cuda", [75, 90]), ("triton", [90])]


@pytest.fixture
def old_nvcc(tmp_path, monkeypatch):
    """A compiler of CUDA 12.0, which knows no later architecture than sm_90."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo release 12.0, V12.0.140\n"
        "[ $1 = --list-gpu-arch ] && printf 'compute_%s\\n' 75 80 86 89 90 1000\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))


def test_an_arch_that_nvcc_does_not_know_is_skipped(old_nvcc, jit, monkeypatch):
    monkeypatch.setattr(jit, "problem", lambda arch: None)
    table = aot.table([90, 100, 120])
    assert table.total == 1 + 3 * len(jit.cases())
    why = "nvcc 12.0 does not know the architecture"
    assert table.notes == [f"CUDA kernels are not listed for sm_100, sm_120: {why}"]
    table = aot.table([100])
    assert table.total == len(jit.cases())
    assert table.notes == [f"CUDA kernels are not listed: {why}"]


def test_nothing_to_list_is_an_error(old_nvcc, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert aot.table([90]).notes == [
        "Triton kernels are not listed: "
        "Triton's interpreter compiles nothing: unset TRITON_INTERPRET"
    ]
    with pytest.raises(
        RuntimeError, match=r"^CUDA kernels .* 12\.0 .*; Triton kernels .*INTERPRET"
    ):
        aot.table([120])
