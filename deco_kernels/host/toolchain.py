"""What is the CUDA library built of, and with? Its sources, flags and compilers.

``setup.py`` loads this file alone, to build ahead of time: it imports nothing of the package.
"""

import hashlib
import importlib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch

SOURCES = ("bindings.cpp", "pool.cu", "pool_linear.cu", "dgelu.cu", "facts.cu")
FLAGS = {"cxx": ["-O2"], "nvcc": ["-O3"]}
AHEAD_OF_TIME = "deco_kernels._deco_kernels_C"  # the last part is a namespace of torch.ops, too


def folder() -> Path:
    """The C++ sources: in an installed package, or in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "csrc"
    return installed if installed.is_dir() else package.parent / "csrc"


def ptx_arch(archs: str) -> int:
    """The first architecture of a list such as "8.0 9.0+PTX" that keeps its PTX: 90; or 0."""
    kept = re.findall(r"(\d+)\.(\d)\w?\+PTX", archs)
    return min((10 * int(major) + int(minor) for major, minor in kept), default=0)


def facts(archs: str) -> list[str]:
    """Compiler flags that tell the library what it is built of and for."""
    return [f"-DDECO_SOURCES={digest():#x}", f"-DDECO_PTX_ARCH={ptx_arch(archs)}"]


def digest() -> int:
    """Of the C++ sources."""
    found = hashlib.sha256()
    for file in sorted(path for path in folder().glob("*") if path.is_file()):
        found.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return int(found.hexdigest()[:15], 16)


@lru_cache
def missing() -> str | None:
    """What any build of the library lacks; None if nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    compiler = nvcc()
    if compiler is None:
        return "nvcc was not found (set CUDA_HOME, or put it on PATH)"
    version = cuda_version(compiler)
    if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
        return (
            f"{compiler} is of CUDA {version or 'an unknown version'}, "
            f"torch {torch.__version__} of CUDA {torch.version.cuda}: the majors must match"
        )
    host = shlex.split(os.environ.get("CXX", "c++"))[0]
    if sys.platform != "win32" and shutil.which(host) is None:
        return f"the C++ compiler {host!r} was not found (install one, or set CXX)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's headers are missing (python3-dev, python3-devel)"
    lost = [name for name in SOURCES if not (folder() / name).is_file()]
    return f"{', '.join(lost)} missing in {folder()}" if lost else None


def nvcc() -> str | None:
    """Found in torch's order of places."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@lru_cache
def known_archs() -> tuple[int, ...]:
    """What nvcc compiles for: (75, ..., 120); empty if it does not tell."""
    compiler = nvcc()
    listed = ask(compiler, "--list-gpu-arch") if compiler else ""
    return tuple(map(int, re.findall(r"compute_(\d+)", listed)))


def cuda_version(nvcc: str) -> str:
    """Such as "13.0"; empty if ``nvcc`` does not tell."""
    found = re.search(r"release (\d+\.\d+)", ask(nvcc, "--version"))
    return found[1] if found else ""


def cuda_home(nvcc: str) -> str:
    """The toolkit's root. ``nvcc`` may be a wrapper far from it, but names it in its plan."""
    plan = re.search(r"^#\$ TOP=(.+)$", ask(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
    root = Path(plan[1].strip()).resolve() if plan else None
    if root is None or shutil.which("nvcc", path=root / "bin") is None:
        root = Path(nvcc).parents[1]
    return str(root)


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def search_path() -> str:
    """PATH, and where pip puts ninja: absent from PATH when a venv is used but not activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def torch_builder() -> ModuleType:
    """``torch.utils.cpp_extension``, without its warning that no GPU is visible."""
    log = logging.getLogger("torch.utils.cpp_extension")
    log.disabled, before = True, log.disabled
    try:
        return importlib.import_module("torch.utils.cpp_extension")
    finally:
        log.disabled = before
