"""Do the CUDA C++ kernels and their bindings do what they say, wherever they run?"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machines.cuda import COMPILER, SANITIZE, mutant, on_host, on_ptx, require_compilers

from deco_kernels import Stencil, backends, pool
from deco_kernels.backends import cuda
from deco_kernels.kernels.launch import Chip, stand_in
from deco_kernels.tools.measure import float32_matmul

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="not Triton's")
SECTOR = 32
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _compilers():
    require_compilers()


def tables(grid_in, grid_out):
    return Stencil.adaptive(grid_in, grid_out).tables("cpu", torch.float32)


# The same bits


def whole(*shape):
    """Whole numbers, whose sums are exact in any order."""
    return torch.randint(-4, 5, shape).float()


@pytest.mark.parametrize("arch", [80, pytest.param(90, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
def test_nvccs_code_and_the_cpus_give_the_same_bits(arch, dtype):
    require_compilers(ptx=True)
    x, w = whole(3, 64, 88).to(dtype), whole(136, 88).to(dtype)
    d, z = torch.randn(70, 40).to(dtype), torch.randn(70, 40).to(dtype)
    rows, columns = tables((8, 8), (4, 4))
    found = []
    for machine in (on_host(seed=5, resident=3), on_ptx(arch)):
        with machine, float32_matmul("tf32"):
            p, y, _ = cuda.pool_linear(x, rows, w, None, None, True)
            dx = cuda.pool(torch.sin(x[:, :16].float()).to(dtype), columns, dtype)
            operators = cuda.library.operators(d.device)
            dz, g, sums = d.clone(), torch.empty_like(z), torch.empty(2, 40)
            operators.dgelu(dz, z, g, sums)
        found.append((p, y, dx, dz, g, sums))
    for i, (host, chip) in enumerate(zip(*found, strict=True)):
        if i < 3:
            torch.testing.assert_close(host, chip, rtol=0, atol=0)
        else:  # exp2 and erf are each machine's own
            eps = torch.finfo(host.dtype).eps
            torch.testing.assert_close(host, chip, rtol=2 * eps, atol=1e-6)


# Odd input


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", ["sliced", "channels first", "every second", "shifted"])
def test_strided_tokens_and_weights(dtype, layout):
    rows, columns = tables((5, 5), (3, 3))
    if layout == "channels first":
        x, w = torch.randn(4, 40, 25).transpose(1, 2), torch.randn(40, 48).T
    elif layout == "every second":
        x, w = torch.randn(4, 50, 80)[:, ::2, ::2], torch.randn(48, 80)[:, ::2]
    elif layout == "shifted":
        x, w = torch.randn(4 * 25 * 40 + 1)[1:].view(4, 25, 40), torch.randn(48, 41)[:, 1:]
    else:
        x, w = torch.randn(4, 26, 40)[:, 1:], torch.randn(48, 48)[:, :40]
    x, w = as_laid_out(x, dtype), as_laid_out(w, dtype)
    with on_host(seed=2, resident=2), float32_matmul("tf32"):
        p, z, g = cuda.pool_linear(x, rows, w, torch.zeros(48, dtype=dtype), "gelu", True)
        plain = cuda.pool_linear(x.contiguous(), rows, w.contiguous(), None, "gelu", True)
        dx = cuda.pool(as_laid_out(x[:, :9], dtype), columns, dtype)
        plain_dx = cuda.pool(x[:, :9].contiguous(), columns, dtype)
        dp = torch.randn(4, 9, 40).to(dtype)
        acted = [cuda.pool(t, rows, dtype, "silu") for t in (x, x.contiguous())]
        slopes = [cuda.dact_pool(dp, columns, t, "silu") for t in (x, x.contiguous())]
    pairs = *zip((p, z, g, dx), (*plain, plain_dx), strict=True), acted, slopes
    for ours, same in pairs:
        torch.testing.assert_close(ours, same, rtol=0, atol=0)


def as_laid_out(t, dtype):
    """``t`` in another dtype, with its strides and its distance from an aligned address."""
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    memory = torch.zeros(size + t.storage_offset(), dtype=dtype)
    out = memory.as_strided(t.shape, t.stride(), t.storage_offset())
    return out.copy_(t)


def test_one_feature_whose_stride_may_be_anything():
    rows, _ = tables((4, 4), (2, 2))
    w = torch.randn(64, 1).to(BF16).T  # [1, 64], and a row's stride of 1
    assert w.is_contiguous()
    x = torch.randn(2, 16, 64).to(BF16)
    with on_host():
        _, z, _ = cuda.pool_linear(x, rows, w, None, None, True)
        _, same, _ = cuda.pool_linear(x, rows, w.clone(), None, None, True)
    assert torch.equal(z, same)


@pytest.mark.parametrize("act", [None, "gelu", "silu"])
def test_an_infinity_reaches_its_own_windows_only(act):
    rows, _ = tables((5, 5), (3, 3))
    x = torch.zeros(1, 25, 8)
    x[0, 24] = float("inf")
    with on_host():
        p = cuda.pool(x, rows, torch.float32, act)
    assert p[0, 8].isinf().all()
    assert (p[0, :8] == 0).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_no_images_launch_nothing(dtype):
    rows, _ = tables((4, 4), (2, 2))
    w = torch.randn(8, 8).to(dtype)
    with stand_in(Chip(80, 1), None), cuda.library.stand_in(object()):
        p, z, g = cuda.pool_linear(torch.empty(0, 16, 8).to(dtype), rows, w, None, "gelu", True)
        dz, dg, db = cuda.dact_linear(torch.empty(0, 8).to(dtype), w, z.view(0, 8), True, True)
    assert [t.shape for t in (p, z, g)] == [(0, 4, 8)] * 3
    assert (dz.shape, dg.shape) == ((0, 8), (0, 8))
    assert torch.equal(db, torch.zeros(8, dtype=dtype))


def test_of_two_launches_the_sums_are_bitwise_equal():
    d, z = torch.randn(300, 72), torch.randn(300, 72)
    found = []
    for seed in (1, 2):
        with on_host(seed=seed, resident=4):
            found.append(cuda.dact_linear(d, torch.eye(72), z, True, True))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# Which backend runs


@pytest.mark.parametrize(
    ("arch", "dtype", "problem"),
    [
        (70, torch.float16, "compute capability 7.0 is below 7.5"),
        (75, BF16, "bfloat16 needs compute capability 8.0, this is 7.5"),
        (75, torch.float16, None),
        (120, BF16, None),
        (90, torch.float64, "float64 is left to torch"),
    ],
)
def test_chips_and_dtypes(arch, dtype, problem):
    with stand_in(Chip(arch, 1), None), cuda.library.stand_in(object()):
        assert backends.unusable("cuda", torch.device("cpu"), dtype) == problem


def test_before_ampere_float32_is_cublass_whatever_torchs_setting():
    with float32_matmul("tf32"), stand_in(Chip(75, 1), None):
        assert not cuda.fuses(torch.device("cpu"), torch.float32)
    with float32_matmul("tf32"), stand_in(Chip(80, 1), None):
        assert cuda.fuses(torch.device("cpu"), torch.float32)


@pytest.mark.parametrize(
    ("triton", "library", "choice"),
    [
        (None, None, "triton"),
        ("no triton here", None, "cuda"),
        ("no triton here", "nvcc was not found", "eager"),
    ],
)
def test_auto_takes_cuda_where_triton_cannot_run(monkeypatch, triton, library, choice):
    monkeypatch.setattr(backends.get("triton"), "unusable", lambda device, dtype: triton)
    monkeypatch.setattr(cuda, "unusable", lambda device, dtype: library)
    monkeypatch.setattr(cuda, "prepare", lambda device: None)
    found = backends.choose("auto", torch.device("cuda:0"), BF16)
    assert found.backend == ("eager" if choice == "eager" else "auto")  # depends on sizes
    assert backends.preferred(torch.device("cuda:0"), BF16).backend == choice
    for problem in (triton, library):
        assert problem is None or problem in found.reason


def test_auto_is_eager_where_the_library_cannot_be_built(monkeypatch):
    def prepare(device):
        raise RuntimeError("building the CUDA kernels failed\nand a long story")

    monkeypatch.setattr(backends.get("triton"), "unusable", lambda device, dtype: "no triton")
    monkeypatch.setattr(cuda, "unusable", lambda device, dtype: None)
    monkeypatch.setattr(cuda, "prepare", prepare)
    found = backends.choose("auto", torch.device("cuda:0"), BF16)
    assert found.backend == "eager"
    assert found.reason.endswith("but building the CUDA kernels failed")
    assert backends.preferred(torch.device("cuda:0"), BF16).backend == "cuda"
    assert backends.choose("cuda", torch.device("cuda:0"), BF16).backend == "cuda"


def test_on_the_cpu_it_says_what_it_needs():
    with pytest.raises(RuntimeError, match="'cuda' cannot run here: it needs a CUDA device"):
        pool(torch.randn(1, 16, 8), Stencil.adaptive((4, 4), (2, 2)), backend="cuda")


# Counts


def test_pooling_takes_few_instructions_and_reads_every_token_once():
    """2 x 2 windows, bfloat16: at most 5 instructions of a thread for an element of x."""
    require_compilers(ptx=True)
    rows, _ = tables((24, 24), (12, 12))
    x = torch.randn(29, 576, 1024).to(BF16)  # rows enough that a warp takes a whole one
    with on_ptx(90, race=False) as launches:
        p = cuda.pool(x, rows, BF16)
    stats = launches[0]
    instructions = 32 * sum(stats.warp_insts.values()) / x.numel()
    assert 1 < instructions <= 5
    _, nbytes, sectors = stats.buffers["ld", "x"]
    assert nbytes == SECTOR * sectors == 2 * x.numel()
    _, nbytes, sectors = stats.buffers["st", "p"]
    assert nbytes == SECTOR * sectors == 2 * p.numel()


@pytest.mark.parametrize(
    ("act", "forward_most", "backward_most"), [("gelu", 26, 36), ("silu", 17, 31)]
)
def test_activated_pooling_reads_every_token_once(act, forward_most, backward_most):
    """2 x 2 windows, bfloat16: the instructions of a thread for an element, and what is read."""
    require_compilers(ptx=True)
    rows, columns = tables((12, 12), (6, 6))
    x, dp = torch.randn(2, 144, 1024).to(BF16), torch.randn(2, 36, 1024).to(BF16)
    with on_ptx(90, race=False) as launches:
        p = cuda.pool(x, rows, BF16, act)
        cuda.dact_pool(dp, columns, x, act)
    forward, backward = launches
    for stats, most in zip(launches, (forward_most, backward_most), strict=True):
        assert 1 < 32 * sum(stats.warp_insts.values()) / x.numel() <= most
    plan = [(forward, "ld", "x", x), (forward, "st", "p", p)]
    plan += [(backward, "ld", "pre", x), (backward, "st", "p", x)]
    for stats, how, name, tensor in plan:
        assert stats.buffers[how, name][1:] == [2 * tensor.numel(), 2 * tensor.numel() / SECTOR]
    assert backward.buffers["ld", "x"][1] == 2 * x.numel()  # each token's window


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_bank_conflicts_and_bytes_of_pool_linear(dtype):
    require_compilers(ptx=True)
    rows, _ = tables((24, 24), (12, 12))
    x, w = torch.randn(2, 576, 256).to(dtype), torch.randn(256, 256).to(dtype)
    with on_ptx(80, race=False) as launches, float32_matmul("tf32"):
        p, z, _ = cuda.pool_linear(x, rows, w, torch.randn(256).to(dtype), "gelu", True)
    stats = launches[0]
    assert sum(requests for requests, _, _ in stats.shared.values()) > 1000
    assert not {line: c for line, c in stats.shared.items() if c[1] != c[2]}
    panels, columns, size = 3, 2, dtype.itemsize
    plan = {
        ("ld", "x"): x.numel() * size,
        ("ld", "p"): columns * p.numel() * size,
        ("ld", "w"): panels * w.numel() * size,
        ("st", "p"): p.numel() * size,
        ("st", "z"): z.numel() * size,
        ("st", "g"): z.numel() * size,
    }
    for key, nbytes in plan.items():
        assert stats.buffers[key][1] == nbytes, key
        assert stats.buffers[key][2] * SECTOR == nbytes, key


def test_bank_conflicts_would_be_seen(tmp_path):
    require_compilers(ptx=True)
    csrc = mutant(tmp_path, "pool_linear.cu", {"(chunk ^ (row >> 1 & 3))": "chunk"})
    rows, _ = tables((4, 4), (2, 2))
    with on_ptx(80, csrc, race=False) as launches:
        cuda.pool_linear(
            torch.randn(4, 16, 64).to(BF16), rows, torch.randn(64, 64).to(BF16), None, None, True
        )
    assert any(waves > ideal for _, waves, ideal in launches[0].shared.values())


# The sanitizers


def run_time_library(name):
    ask = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing():
    """The parity tests on the CPU once more, in a process with the sanitizers' run time."""
    # With libstdc++, whose exceptions the sanitizer wants to know when it starts.
    libraries = [run_time_library(name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(map(os.path.isabs, libraries)):
        pytest.skip("no AddressSanitizer")
    environment = {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        SANITIZE: "1",
    }
    tests = Path(__file__).parents[1]
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
            *(
                str(tests / room / f"test_{name}.py")
                for room, name in (
                    ("kernels", "kernels"),
                    ("cuda", "cuda"),
                    ("functional", "act_pool_linear"),
                )
            ),
            *("-k", "(cuda-host and (bf16-overlapping or unaligned or stock)) or strided_tokens"),
        ],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 16
