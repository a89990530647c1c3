"""Where does the CUDA library come from? Out of the wheel, from an earlier build, or built now."""

import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import toolchain
from .requirements import unwritable

LONGEST_WAIT = 1800  # seconds, for another process's build
MEANWHILE = 'backend="eager" works meanwhile'

_stand_in: Any = None
_namespaces: dict[torch.device, Any] = {}
_built: ModuleType | None = None
_failure: str | None = None
_one_thread = threading.Lock()


@contextmanager
def stand_in(operators: Any) -> Iterator[None]:
    """Let ``operators`` compute in place of the library's."""
    global _stand_in
    before, _stand_in = _stand_in, operators
    try:
        yield
    finally:
        _stand_in = before


def standing_in() -> bool:
    return _stand_in is not None


def operators(device: torch.device) -> Any:
    """The namespace ``torch.ops.<name of the library>``; the first call may build it.

    Raises:
        RuntimeError: the library cannot be had; says what is missing, or what the compiler said.
    """
    if _stand_in is not None:
        return _stand_in
    found = _namespaces.get(device)
    if found is None:
        major, minor = torch.cuda.get_device_capability(device)
        found = _namespaces[device] = namespace(library(10 * major + minor))
    return found


def namespace(module: ModuleType) -> Any:
    return getattr(torch.ops, module.__name__.rpartition(".")[2])


def library(arch: int) -> ModuleType:
    """The library with code for compute capability ``arch`` (90 for 9.0)."""
    if _fits(arch):
        return _ahead_of_time()
    reason = problem(arch)
    if reason:
        raise RuntimeError(f"the CUDA kernels cannot be had: {reason}; {MEANWHILE}")
    return build()


def problem(arch: int) -> str | None:
    """Why there can be no library for compute capability ``arch``; None if there is or can be."""
    return None if _stand_in is not None else _problem(arch)


@lru_cache
def _problem(arch: int) -> str | None:
    if _fits(arch):
        return None
    archs = wanted_archs()
    if not archs:
        return "no GPU is visible; set TORCH_CUDA_ARCH_LIST to build without one"
    listed = [re.fullmatch(r"(\d+)\.(\d)\w?(?:\+PTX)?", word) for word in archs.split()]
    if all(listed):  # torch has names, too, as "Ampere"
        numbers = [10 * int(word[1]) + int(word[2]) for word in listed]
        if not _covers(numbers, toolchain.ptx_arch(archs), arch):
            return f"TORCH_CUDA_ARCH_LIST ({archs}) has nothing for compute capability {arch / 10}"
    return _obstacle()


@lru_cache
def _obstacle() -> str | None:
    """Why there can be no first-use build; None if there is one or can be."""
    if _failure:
        return _failure.partition("\n")[0]
    try:
        if wanted_archs() and target().is_file():
            return None
        toolchain.torch_builder()
    except ImportError as error:
        return f"torch.utils.cpp_extension cannot be imported ({error})"
    if shutil.which("ninja", path=toolchain.search_path()) is None:
        return "ninja is missing (pip install ninja)"
    lost = toolchain.missing()
    if lost:
        return lost
    problem = unwritable(target().parent)
    return f"{problem}; set TORCH_EXTENSIONS_DIR to a folder that can be" if problem else None


def state() -> str:
    """One line for ``info``."""
    ahead = _ahead_of_time()
    if ahead is not None:
        archs = [f"{a / 10}{'+PTX' * (a == ahead.ptx_arch)}" for a in ahead.arch_list]
        return f"built ahead of time for {', '.join(archs)}"
    reason = _obstacle()
    if reason:
        return f"cannot be built: {reason}"
    if wanted_archs() and target().is_file():
        return f"built at first use in {target().parent}"
    return f"not built yet; buildable (nvcc {toolchain.cuda_version(toolchain.nvcc())})"


def built(arch: int) -> bool:
    """Whether the library is there for ``arch``, so that its first use starts no compiler."""
    return _fits(arch) or bool(not _obstacle() and wanted_archs() and target().is_file())


def _fits(arch: int) -> bool:
    ahead = _ahead_of_time()
    return ahead is not None and _covers(ahead.arch_list, ahead.ptx_arch, arch)


def _covers(archs: Iterable[int], ptx: int, arch: int) -> bool:
    """Machine code runs on later minor versions of its architecture, PTX on all later ones."""
    return any(a // 10 == arch // 10 and a <= arch for a in archs) or 0 < ptx <= arch


@lru_cache
def _ahead_of_time() -> ModuleType | None:
    try:
        module = importlib.import_module(toolchain.AHEAD_OF_TIME)
    except ModuleNotFoundError:
        return None
    except ImportError as error:
        reason = str(error)
    else:
        if not torch.__version__.startswith(module.torch_version):
            reason = f"for torch {module.torch_version}, this is {torch.__version__}"
        elif module.sources != toolchain.digest():
            reason = f"of other sources than are in {toolchain.folder()}"
        else:
            return module
    warnings.warn(f"CUDA kernels built ahead of time are unusable: {reason}", stacklevel=2)
    return None


def wanted_archs() -> str:
    """What a first-use build is for, such as "8.0 9.0+PTX"; empty if nobody said and no GPU is."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    if listed and listed != ["native"]:
        return " ".join(listed)
    visible = range(torch.cuda.device_count())
    capabilities = {torch.cuda.get_device_capability(i) for i in visible}
    known = toolchain.known_archs()
    archs = set()
    for major, minor in sorted(c for c in capabilities if c >= (7, 5)):
        fitting = [m for a, m in (divmod(arch, 10) for arch in known) if a == major and m <= minor]
        if fitting or not known:
            archs.add(f"{major}.{max(fitting, default=minor)}")
        else:  # a GPU that this nvcc does not know: it compiles the PTX itself
            archs.add(f"{max(known) / 10}+PTX")
    return " ".join(sorted(archs))


def target() -> Path:
    """The finished library of a first-use build: the path tells everything that went into it."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = root or toolchain.torch_builder().get_default_build_root()
    tag = sysconfig.get_config_var("EXT_SUFFIX")
    made_of = tag, wanted_archs(), toolchain.FLAGS, toolchain.digest()
    all_that_matters = torch.__version__, torch.version.cuda, *made_of
    key = hashlib.sha256(repr(all_that_matters).encode()).hexdigest()[:16]
    name = f"_deco_kernels_{key}" + (".pyd" if sys.platform == "win32" else ".so")
    return Path(root).resolve() / "deco_kernels" / key / name


def build() -> ModuleType:
    """The library of a first-use build: an earlier one's, or this one's.

    Raises:
        RuntimeError: it failed, now or earlier in this process.
    """
    global _built, _failure
    with _one_thread:
        if _failure:
            raise RuntimeError(_failure)
        if _built is None:
            try:
                _built = _find_or_make()
            except BaseException as error:  # also Ctrl-C: torch builds a name once in a process
                _failure = str(error) or f"the build ended by {type(error).__name__}"
                _problem.cache_clear()
                _obstacle.cache_clear()
                raise
        return _built


def _find_or_make() -> ModuleType:
    library = target()
    if library.is_file():
        return _import(library)
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with _only_process(library.parent.with_suffix(".lock")):
            return _import(library) if library.is_file() else _make(library)
    except OSError as error:
        raise RuntimeError(
            f"cannot build the CUDA kernels in {library.parent} ({error}); "
            f"set TORCH_EXTENSIONS_DIR to a folder that can be written; {MEANWHILE}"
        ) from error


@contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Hold a lock that the system takes back from a process that is killed."""
    from filelock import FileLock, Timeout  # only a build wants it

    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            _say(f"waiting for another process that builds the CUDA kernels ({path})")
            lock.acquire(timeout=LONGEST_WAIT)
    except Timeout:
        raise RuntimeError(
            f"another process has held {path} for {LONGEST_WAIT} seconds; end it; {MEANWHILE}"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _make(library: Path) -> ModuleType:
    home = library.parent
    # Never a killed build's folder: its compilers may still be alive and write to it.
    for left in home.glob("build-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="build-", dir=home))
    _say(f"building the CUDA kernels for {wanted_archs()} (once, about a minute) in {home}")
    start = time.monotonic()
    try:
        module = _compile(library.stem, work)
        os.replace(work / library.name, library)
    except Exception as error:
        log = home / "build.log"
        log.write_text(traceback.format_exc(), encoding="utf-8")
        raise RuntimeError(
            f"building the CUDA kernels failed, all of it is in {log}\n"
            f"{_last_lines(str(error))}\n{MEANWHILE}"
        ) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    _say(f"built the CUDA kernels in {time.monotonic() - start:.0f} s")
    return module


def _compile(name: str, work: Path) -> ModuleType:
    builder = toolchain.torch_builder()
    builder.CUDA_HOME = toolchain.cuda_home(toolchain.nvcc())
    changes = {"PATH": toolchain.search_path(), "TORCH_CUDA_ARCH_LIST": wanted_archs()}
    before = {key: os.environ[key] for key in changes if key in os.environ}
    os.environ.update(changes)
    try:
        return builder.load(
            name,
            [str(toolchain.folder() / source) for source in toolchain.SOURCES],
            extra_cflags=toolchain.FLAGS["cxx"] + toolchain.facts(wanted_archs()),
            extra_cuda_cflags=toolchain.FLAGS["nvcc"],
            build_directory=str(work),
        )
    finally:
        for key in changes:
            del os.environ[key]
        os.environ.update(before)


def _last_lines(output: str, count: int = 20) -> str:
    """What compilers said last, without the long lines that are their commands."""
    lines = [line for line in output.splitlines() if line.strip() and " -o " not in line]
    return "\n".join(f"    {line[:200]}" for line in lines[-count:])


def _import(library: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(library.stem, library)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise RuntimeError(
            f"cannot load the CUDA kernels ({error}); delete {library.parent} to build them anew; "
            f"{MEANWHILE}"
        ) from error
    return module


def _say(text: str) -> None:
    print(f"deco_kernels: {text}", file=sys.stderr, flush=True)
