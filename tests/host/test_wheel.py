"""Does the wheel carry the kernels' sources, or the library where it can be built?"""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from machines.build import REPOSITORY, fresh, machine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in compilers are sh")


@pytest.fixture
def here(tmp_path, monkeypatch):
    return machine(tmp_path, monkeypatch)


def checkout(folder):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, folder)
    for name in ("deco_kernels", "csrc"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignore)
    return folder


def build_wheel(folder, **environment):
    """As pip does it; without a torch, unless ``PYTHONPATH`` says otherwise."""
    hidden = folder / "hidden"
    hidden.mkdir(exist_ok=True)
    (hidden / "torch.py").write_text("raise ImportError(\"No module named 'torch'\")\n")
    inherited = {k: v for k, v in os.environ.items() if k != "DECO_KERNELS_BUILD_CUDA"}
    return subprocess.run(
        [sys.executable, "-c", "from setuptools import build_meta as b; b.build_wheel('dist')"],
        cwd=folder,
        env={**inherited, "PYTHONPATH": str(hidden), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("switch", [{}, {"DECO_KERNELS_BUILD_CUDA": "0"}])
def test_without_torch_the_wheel_is_pure_and_carries_the_sources(tmp_path, switch):
    run = build_wheel(checkout(tmp_path), **switch)
    assert run.returncode == 0, run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"deco_kernels/csrc/{path.name}" for path in (REPOSITORY / "csrc").iterdir()}
    modules = {
        str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("deco_kernels/**/*.py")
    }
    data = {"deco_kernels/py.typed", "deco_kernels/tuning/table.json"}
    assert sources | modules | data <= names
    said = "left to its first use: No module named 'torch'" in run.stdout
    assert said == (not switch)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DECO_KERNELS_BUILD_CUDA": "yes"}, "must be 0 or 1, or not set; got 'yes'"),
        ({"DECO_KERNELS_BUILD_CUDA": ""}, "must be 0 or 1, or not set; got ''"),
        ({"DECO_KERNELS_BUILD_CUDA": "1"}, "No module named 'torch' .*--no-build-isolation"),
        (
            {"DECO_KERNELS_BUILD_CUDA": "1", "PYTHONPATH": "", "CUDA_HOME": "/nowhere"},
            "cannot be built: (nvcc was not found|torch .* without CUDA)",
        ),
    ],
)
def test_a_library_that_is_demanded_and_cannot_be_built_is_an_error(tmp_path, environment, message):
    run = build_wheel(checkout(tmp_path), **environment)
    assert run.returncode != 0
    assert re.search(message, run.stderr)
    assert not list(tmp_path.glob("dist/*.whl"))


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch is built without CUDA")
@pytest.mark.parametrize("archs", ["", "8.0 9.0"])
def test_ahead_of_time_the_archs_are_those_asked_for_or_all_that_nvcc_knows(here, archs):
    folder = here.tmp / "checkout"
    folder.mkdir()
    shutil.rmtree(checkout(folder) / "csrc")
    shutil.copytree(here.csrc, folder / "csrc")
    run = build_wheel(folder, PYTHONPATH="", TORCH_CUDA_ARCH_LIST=archs)
    assert run.returncode == 0, run.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    names = [n for n in zipfile.ZipFile(wheel).namelist() if re.search("/_deco_kernels_C[.]", n)]
    assert len(names) == 1
    assert not wheel.name.endswith("-py3-none-any.whl")
    machine = {"compute_80,code=sm_80", "compute_90,code=sm_90"}
    later = set() if archs else {"compute_100,code=sm_100", "compute_100,code=compute_100"}
    assert len(here.compiled()) == 4
    for command in here.compiled():
        assert set(re.findall(r"-gencode=arch=(\S+)", command)) == machine | later


# The real thing


@pytest.fixture
def toolchain(monkeypatch):
    problem = fresh(monkeypatch).toolchain.missing()
    if problem:
        pytest.skip(problem)


def python(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.usefixtures("toolchain")
def test_the_kernels_build_at_first_use(tmp_path):
    code = """if True:
        import torch
        from deco_kernels.host import library, toolchain
        library._ahead_of_time = lambda: None
        module = library.library(90)
        operators = library.namespace(module)
        assert module.arch_list == [80, 90], module.arch_list
        assert (module.ptx_arch, module.sources) == (0, toolchain.digest())
        assert module.cuda_version // 1000 == int(torch.version.cuda.partition(".")[0])
        assert torch.__version__.startswith(module.torch_version)
        for name in ("pool", "pool_linear", "dgelu"):
            print(getattr(operators, name).default._schema)
        x, weight = torch.zeros(1, 4, 8), torch.zeros(1, 4)
        index = torch.zeros(1, 4, dtype=torch.int32)
        try:
            operators.pool(x, index, weight, False, None, None, torch.zeros(1, 1, 8))
        except (RuntimeError, ValueError) as error:
            print(error)
        else:
            raise AssertionError("took tensors on the CPU")
    """
    environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "8.0 9.0"}
    run = python(code, REPOSITORY, **environment)
    assert run.returncode == 0, run.stderr
    assert "must be on a cuda device, got one on cpu" in run.stdout
    first, last = run.stderr.splitlines()
    assert "building the CUDA kernels for 8.0 9.0 " in first
    assert "built the CUDA kernels in" in last


@pytest.mark.slow
@pytest.mark.usefixtures("toolchain")
def test_the_kernels_build_ahead_of_time(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    environment = {"DECO_KERNELS_BUILD_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "8.0"}
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    install = subprocess.run(
        [*pip, "--no-index", "--target", str(target), str(checkout(source))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert install.returncode == 0, install.stdout + install.stderr
    code = """if True:
        from deco_kernels.host import library, toolchain
        print(library.state())
        print(library.namespace(library.library(86)).pool.default._schema)
    """
    run = python(code, tmp_path, PYTHONPATH=str(target), TORCH_EXTENSIONS_DIR=str(tmp_path))
    assert run.returncode == 0, run.stderr
    state, schema = run.stdout.splitlines()
    assert state == "built ahead of time for 8.0"
    assert schema.startswith("_deco_kernels_C::pool(")
    assert run.stderr == ""
