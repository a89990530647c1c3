"""Is the CUDA library built once, whole, from what is here, or is it said why not?"""

import os
import re
import sys
import time
from types import ModuleType

import pytest
import torch
from filelock import FileLock
from machines.build import BINDINGS, CUDA, executable, machine

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in compilers are sh")


@pytest.fixture
def here(tmp_path, monkeypatch):
    return machine(tmp_path, monkeypatch)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(process):
    out, _ = process.communicate(timeout=60)
    return process.returncode == 0 and out == "[80, 90]\n"


def ahead_of_time(monkeypatch, extension, torch_version=torch.__version__):
    module = ModuleType(extension.toolchain.AHEAD_OF_TIME)
    module.arch_list, module.ptx_arch, module.torch_version = [80, 90], 0, torch_version
    module.sources = extension.toolchain.digest()
    monkeypatch.setitem(sys.modules, extension.toolchain.AHEAD_OF_TIME, module)
    return module


def test_first_use_builds_publishes_and_says_so(here, capfd):
    extension, environment = here.extension, dict(os.environ)
    assert extension.problem(80) is None
    assert extension.state() == f"not built yet; buildable (nvcc {CUDA})"
    assert capfd.readouterr().err == ""
    assert extension.library(80).arch_list == [80, 90]
    first, last = capfd.readouterr().err.splitlines()
    library = extension.target()
    assert first == (
        "deco_kernels: building the CUDA kernels for 8.0 (once, about a minute) "
        f"in {library.parent}"
    )
    assert re.fullmatch(r"deco_kernels: built the CUDA kernels in \d+ s", last)
    assert [path.name for path in library.parent.iterdir()] == [library.name]
    assert library.is_relative_to(here.tmp / "cache" / "deco_kernels")
    assert len(here.compiled()) == 4
    assert extension.state() == f"built at first use in {library.parent}"
    assert dict(os.environ) == environment


def test_a_later_process_needs_no_compiler_and_no_lock(here):
    here.extension.library(80)
    assert len(here.compiled()) == 4
    with FileLock(here.extension.target().parent.with_suffix(".lock")):
        later = here.process(PATH=str(here.tmp), CUDA_HOME=str(here.tmp), CXX="nothing")
        assert finished(later), here.said()
    assert here.said() == ""
    assert len(here.compiled()) == 4


def test_two_processes_build_once(here):
    pause = here.tmp / "pause"
    pause.touch()
    both = [here.process(PAUSE=str(pause)) for _ in range(2)]
    wait_for(lambda: "waiting for another process that builds the CUDA kernels" in here.said())
    pause.unlink()
    assert [finished(process) for process in both] == [True, True], here.said()
    assert here.said().count("building the CUDA kernels for") == 1
    assert len(here.compiled()) == 4


def test_after_a_killed_build_the_next_one_is_clean(here):
    pause = here.tmp / "pause"
    pause.touch()
    killed = here.process(PAUSE=str(pause))
    wait_for(here.compiled)
    killed.kill()
    killed.communicate()
    library = here.extension.target()
    assert [path.name[:6] for path in library.parent.iterdir()] == ["build-"]
    try:  # its compilers are still alive
        assert here.extension.library(80).arch_list == [80, 90]
    finally:
        pause.unlink()
    assert [path.name for path in library.parent.iterdir()] == [library.name]


def test_the_compilers_last_words_are_in_the_error(here, capfd):
    extension = here.extension
    (here.csrc / "bindings.cpp").write_text('#error "the answer is not 41"\n')
    with pytest.raises(RuntimeError, match="the answer is not 41") as caught:
        extension.library(80)
    first, *lines, last = str(caught.value).splitlines()
    log = extension.target().parent / "build.log"
    assert first == f"building the CUDA kernels failed, all of it is in {log}"
    assert last == 'backend="eager" works meanwhile'
    assert len(lines) <= 20
    assert not any("TORCH_EXTENSION_NAME" in line for line in lines)
    assert "TORCH_EXTENSION_NAME" in log.read_text()
    assert [path.name for path in log.parent.iterdir()] == [log.name]

    assert extension.problem(80) == first
    assert extension.state() == f"cannot be built: {first}"
    compiled = len(here.compiled())
    with pytest.raises(RuntimeError, match="building the CUDA kernels failed"):
        extension.library(80)
    with pytest.raises(RuntimeError, match="the answer is not 41"):
        extension.build()
    assert len(here.compiled()) == compiled


def test_what_cannot_be_imported_is_not_published(here):
    (here.csrc / "bindings.cpp").write_text(
        BINDINGS.replace("return m;", "void lost(); lost(); return m;")
    )
    with pytest.raises(RuntimeError, match=r"undefined symbol.*lost"):
        here.extension.library(80)
    assert not here.extension.target().exists()


def test_a_damaged_library_is_an_error_that_says_what_to_delete(here):
    library = here.extension.target()
    library.parent.mkdir(parents=True)
    library.write_bytes(b"\x7fELF")
    with pytest.raises(RuntimeError, match=f"delete {library.parent} to build them anew"):
        here.extension.library(80)


def test_a_folder_that_cannot_be_written_is_told_before_the_build_and_by_it(here, monkeypatch):
    file = here.tmp / "file"
    file.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(file / "below"))
    named = r"cannot be written \(Not a directory\); set TORCH_EXTENSIONS_DIR to a folder that can"
    assert re.search(named, here.extension.problem(80))
    assert re.match(f"cannot be built: .*{named}", here.extension.state())
    with pytest.raises(RuntimeError, match=f"the CUDA kernels cannot be had: .*{named}"):
        here.extension.library(80)
    with pytest.raises(RuntimeError, match="set TORCH_EXTENSIONS_DIR to a folder that can be"):
        here.extension.build()
    assert here.compiled() == []


def test_a_library_in_a_folder_that_became_read_only_still_serves(here, monkeypatch):
    here.extension.library(80)
    monkeypatch.setattr(
        "deco_kernels.host.requirements.unwritable", lambda folder: f"{folder} is read-only"
    )
    for cached in (here.extension._problem, here.extension._obstacle):
        cached.cache_clear()
    assert here.extension.problem(80) is None


def test_an_interrupted_build_leaves_nothing_and_is_told(here, monkeypatch):
    def interrupt(name, work):
        raise KeyboardInterrupt

    monkeypatch.setattr(here.extension, "_compile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        here.extension.build()
    assert list(here.extension.target().parent.iterdir()) == []
    assert here.extension.problem(80) == "the build ended by KeyboardInterrupt"


def test_the_wait_for_another_process_ends(here, monkeypatch):
    monkeypatch.setattr(here.extension, "LONGEST_WAIT", 0.1)
    lock = here.extension.target().parent.with_suffix(".lock")
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(RuntimeError, match=f"another process has held {lock}"):
        here.extension.library(80)


def no_cuda(here, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


def older_torch(here, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "11.8")


def no_nvcc(here, monkeypatch):
    (here.root / "bin" / "nvcc").unlink()


def broken_nvcc(here, monkeypatch):
    executable(here.root / "bin" / "nvcc", "#!/nowhere\n")


def no_ninja(here, monkeypatch):
    monkeypatch.setattr(here.toolchain, "search_path", lambda: str(here.tmp))


def no_compiler(here, monkeypatch):
    monkeypatch.setenv("CXX", "teapot -pour")


def no_setuptools(here, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.cpp_extension", raising=False)
    monkeypatch.setitem(sys.modules, "setuptools", None)


def no_headers(here, monkeypatch):
    monkeypatch.setattr(here.toolchain.sysconfig, "get_path", lambda name: str(here.tmp))


def no_source(here, monkeypatch):
    (here.csrc / "pool.cu").unlink()


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        (no_cuda, r"torch \S+ is built without CUDA"),
        (older_torch, r"nvcc is of CUDA [\d.]+, torch \S+ of CUDA 11.8: the majors must match"),
        (no_nvcc, r"nvcc was not found \(set CUDA_HOME, or put it on PATH\)"),
        (broken_nvcc, "nvcc is of CUDA an unknown version"),
        (no_ninja, r"ninja is missing \(pip install ninja\)"),
        (no_compiler, "the C.. compiler 'teapot' was not found"),
        (no_setuptools, "cpp_extension cannot be imported .*setuptools"),
        (no_headers, "Python's headers are missing"),
        (no_source, "pool.cu missing in "),
    ],
)
def test_what_is_missing_is_named(here, monkeypatch, remove, message):
    remove(here, monkeypatch)
    assert re.search(message, here.extension.problem(80))
    assert re.match(f"cannot be built: .*{message}", here.extension.state())
    with pytest.raises(RuntimeError, match=f"the CUDA kernels cannot be had: .*{message}.*eager"):
        here.extension.library(80)
    assert here.compiled() == []


@pytest.mark.parametrize(
    ("archs", "arch", "covered"),
    [
        ("8.0", 80, True),
        ("8.0", 86, True),
        ("8.6;9.0", 80, False),
        ("8.0 8.6", 90, False),
        ("8.0+PTX", 120, True),
        ("9.0+PTX", 86, False),
        ("12.0", 120, True),
        ("Hopper", 90, True),
        ("Ampere 9.0", 80, True),
    ],
)
def test_an_arch_list_must_cover_the_device(here, monkeypatch, archs, arch, covered):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", archs)
    problem = here.extension.problem(arch)
    if covered:
        assert problem is None
    else:
        assert problem.endswith(f"has nothing for compute capability {arch / 10}")


def test_the_visible_gpus_are_built_for_if_nobody_says(here, monkeypatch):
    gpus = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    here.extension.library(90)
    assert len(here.compiled()) == 4
    for command in here.compiled():
        built = re.findall(r"-gencode=arch=(\S+)", command)
        assert built == ["compute_80,code=sm_80", "compute_90,code=sm_90"]
    assert "TORCH_CUDA_ARCH_LIST" not in os.environ


@pytest.mark.parametrize(
    ("gpus", "archs"),
    [
        ([(6, 1), (8, 9)], "8.7"),  # the first is too old for the kernels, the second for this nvcc
        ([(12, 1)], "10.0+PTX"),
        ([(7, 0)], ""),
        ([(9, 0), (8, 0)], "8.0 9.0"),
    ],
)
def test_gpus_that_nvcc_or_the_kernels_do_not_know(here, monkeypatch, gpus, archs):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
    assert here.extension.wanted_archs() == archs


def test_without_gpu_and_arch_list_it_says_what_to_set(here, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(RuntimeError, match="no GPU is visible; set TORCH_CUDA_ARCH_LIST"):
        here.extension.library(80)


def test_a_change_of_anything_is_another_library(here, monkeypatch):
    def rewrite():
        (here.csrc / "pool.cu").write_text("int pool, other;\n")

    targets = [here.extension.target()]
    for change in (
        rewrite,
        lambda: (here.csrc / "new.cuh").touch(),
        lambda: monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0"),
        lambda: monkeypatch.setattr(torch, "__version__", "2.99.0+cu130"),
        lambda: monkeypatch.setattr(torch.version, "cuda", "99.0"),
        lambda: monkeypatch.setitem(here.toolchain.FLAGS, "nvcc", ["-O1"]),
    ):
        assert here.extension.target() == targets[-1]
        change()
        targets.append(here.extension.target())
    assert len(set(targets)) == len(targets)


def test_the_toolkit_is_where_nvcc_says_not_where_its_wrapper_is(here):
    wrapper = here.tmp / "wrapper" / "bin" / "nvcc"
    executable(wrapper, f'#!/bin/sh\nexec {here.root}/bin/nvcc "$@"\n')
    assert here.toolchain.cuda_home(str(wrapper)) == str(here.root.resolve())
    executable(wrapper, "#!/bin/sh\n")
    assert here.toolchain.cuda_home(str(wrapper)) == str(here.tmp / "wrapper")


def test_operators_are_those_of_the_library_and_found_once(here, monkeypatch):
    device, asked = torch.device("cuda", 0), []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: asked.append(device) or (8, 6)
    )
    operators = here.extension.operators(device)
    assert operators is getattr(torch.ops, here.extension.target().stem)
    assert here.extension.operators(device) is operators
    library = here.extension.library(80)
    monkeypatch.setattr(here.extension, "_find_or_make", None)
    assert here.extension.library(86) is library
    assert asked == [device]


def test_a_stand_in_computes_in_place_of_the_library(here, monkeypatch):
    extension, device, stand_in = here.extension, torch.device("cuda", 0), object()
    no_nvcc(here, monkeypatch)
    assert not extension.standing_in()
    with extension.stand_in(stand_in):
        assert extension.standing_in()
        assert extension.operators(device) is stand_in
        assert extension.problem(80) is None
    assert not extension.standing_in()
    assert "nvcc" in extension.problem(80)


def test_a_library_built_ahead_of_time_comes_first(here, monkeypatch):
    module = ahead_of_time(monkeypatch, here.extension)
    no_nvcc(here, monkeypatch)
    assert here.extension.state() == "built ahead of time for 8.0, 9.0"
    assert here.extension.library(80) is here.extension.library(89) is module
    assert here.extension.problem(89) is None
    assert here.extension.namespace(module) is torch.ops._deco_kernels_C
    assert "nothing for compute capability 12.0" in here.extension.problem(120)


def test_a_library_built_ahead_of_time_without_this_gpu_is_passed_over(here, monkeypatch):
    module = ahead_of_time(monkeypatch, here.extension)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "12.0")
    assert here.extension.library(120) is not module
    assert here.extension.library(90) is module
    assert len(here.compiled()) == 4


def test_a_library_built_ahead_of_time_with_ptx_runs_on_later_gpus(here, monkeypatch):
    module = ahead_of_time(monkeypatch, here.extension)
    module.ptx_arch = 90
    assert here.extension.state() == "built ahead of time for 8.0, 9.0+PTX"
    assert here.extension.library(120) is module
    assert here.toolchain.ptx_arch("8.0 9.0+PTX;10.0+PTX") == 90
    assert here.toolchain.ptx_arch("8.0") == 0


def test_a_library_built_ahead_of_time_of_other_sources_is_passed_over(here, monkeypatch):
    module = ahead_of_time(monkeypatch, here.extension)
    (here.csrc / "pool.cu").write_text("int pool, changed;\n")
    with pytest.warns(UserWarning, match="unusable: of other sources than are in"):
        assert here.extension.library(80) is not module


def test_a_library_built_ahead_of_time_for_another_torch_is_passed_over(here, monkeypatch):
    ahead_of_time(monkeypatch, here.extension, torch_version="1.13.0")
    with pytest.warns(UserWarning, match="unusable: for torch 1.13.0, this is "):
        assert here.extension.state() == f"not built yet; buildable (nvcc {CUDA})"
