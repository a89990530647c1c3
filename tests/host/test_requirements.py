"""Is it said before the first launch what this machine lacks for it, and what to set?"""

import re
import shutil
import sys
import sysconfig
from types import SimpleNamespace

import pytest
import torch

from deco_kernels import backends
from deco_kernels.host import requirements
from deco_kernels.tools import info, tune

CUDA = torch.device("cuda", 0)
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A process on a machine with an H100, Triton with an empty cache, and what the test leaves."""
    pytest.importorskip("triton")
    if shutil.which("gcc") is None and shutil.which("clang") is None:
        pytest.skip("no C compiler")
    properties = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(backends.cuda, "unusable", lambda device, dtype: "nvcc was not found")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for name in ("CC", "C_INCLUDE_PATH", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    requirements.triton_lacks.cache_clear()
    yield SimpleNamespace(cache=tmp_path / "triton", empty=tmp_path)
    requirements.triton_lacks.cache_clear()


def reason():
    requirements.triton_lacks.cache_clear()  # as in a new process
    return backends.unusable("triton", CUDA, torch.bfloat16)


def keep(gpu, *names):
    """Files in Triton's cache, as an earlier process left them."""
    for name in names:
        folder = gpu.cache / f"KEY{name}"
        folder.mkdir(parents=True)
        (folder / name).touch()


def no_compiler(gpu, monkeypatch):
    monkeypatch.setenv("PATH", str(gpu.empty))
    return "set CC"


def no_such_compiler(gpu, monkeypatch):
    monkeypatch.setenv("CC", "teapot -pour")
    return "CC names 'teapot -pour', which was not found"


def no_headers(gpu, monkeypatch):
    monkeypatch.setattr(requirements.sysconfig, "get_path", lambda *_: str(gpu.empty))
    return "Python.h.* name their folder in C_INCLUDE_PATH"


def no_cache(gpu, monkeypatch):
    gpu.cache.touch()  # a file, where root cannot write either
    return r"triton cannot be written \(Not a directory\); set TRITON_CACHE_DIR or TRITON_HOME"


def nowhere(gpu, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    return "TRITON_CACHE_DIR is empty; set"


LACKING = pytest.mark.parametrize(
    "remove", [no_compiler, no_such_compiler, no_headers, no_cache, nowhere]
)


@on_linux
def test_where_nothing_is_missing_nothing_is_said_or_left(gpu):
    assert reason() is None
    assert backends.choose("auto", CUDA, torch.bfloat16).backend == "auto"
    assert list(gpu.empty.iterdir()) == []


@on_linux
@LACKING
def test_what_triton_lacks_is_told_before_a_launch_and_auto_goes_on(gpu, monkeypatch, remove):
    told = remove(gpu, monkeypatch)
    found = reason()
    assert re.search(told, found)
    choice = backends.choose("auto", CUDA, torch.bfloat16)
    assert choice == ("eager", f"not triton: {found}; not cuda: nvcc was not found")
    assert info._backend("triton", CUDA).startswith(
        f"bfloat16, float16, float32 not usable: {found}"
    )
    assert found in info._auto(CUDA)
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: "):
        backends.choose("triton", CUDA, torch.bfloat16)


@on_linux
def test_headers_that_only_the_compiler_finds_are_headers(gpu, monkeypatch):
    real = sysconfig.get_path("include", "posix_prefix")
    no_headers(gpu, monkeypatch)
    monkeypatch.setenv("C_INCLUDE_PATH", real)
    assert reason() is None


@on_linux
def test_what_an_earlier_process_compiled_needs_no_compiler(gpu, monkeypatch):
    no_compiler(gpu, monkeypatch)
    keep(gpu, "cuda_utils.cpython-310.so", "__triton_launcher.cpython-310.so")
    assert reason() is None


@on_linux
def test_a_read_only_cache_serves_if_it_has_our_kernels(gpu, monkeypatch):
    monkeypatch.setattr(requirements, "unwritable", lambda folder: f"{folder} cannot be written")
    keep(gpu, "cuda_utils.cpython-310.so")
    assert "set TRITON_CACHE_DIR" in reason()
    keep(gpu, "pool_linear_kernel.json")
    assert reason() is None


@on_linux
def test_it_is_asked_once_a_process(gpu, monkeypatch):
    assert reason() is None
    no_compiler(gpu, monkeypatch)
    assert backends.unusable("triton", CUDA, torch.bfloat16) is None


def test_a_folder_is_tried_and_left_as_it_was(tmp_path):
    assert requirements.unwritable(tmp_path / "a" / "b") is None
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.touch()
    assert (
        requirements.unwritable(file / "b") == f"{file / 'b'} cannot be written (Not a directory)"
    )


def no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DECO_KERNELS_CACHE_DIR", str(tmp_path / "file"))
    return "cannot be written"


def no_home(monkeypatch, tmp_path):
    def lost(path):
        raise RuntimeError("Could not determine home directory.")

    for name in ("DECO_KERNELS_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tune.cache.Path, "expanduser", lost)
    return "Could not determine home"


@pytest.mark.parametrize("lose", [no_folder, no_home])
def test_tune_measures_nothing_that_could_not_be_kept(monkeypatch, tmp_path, lose):
    told = lose(monkeypatch, tmp_path)
    monkeypatch.setattr(tune, "_gpu", lambda device: CUDA)
    monkeypatch.setattr(tune, "measure", None)
    with pytest.raises(OSError, match=f"{told}.*; set DECO_KERNELS_CACHE_DIR to a folder"):
        tune.run()
    with pytest.raises(OSError, match="set DECO_KERNELS_CACHE_DIR"):
        tune.cache.store(0, {})
