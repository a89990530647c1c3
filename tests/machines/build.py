"""A machine for the build's tests: stand-in compilers, and sources that compile in no time."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from deco_kernels import host
from deco_kernels.host import library, toolchain

REPOSITORY = Path(__file__).parents[2]
CUDA = torch.version.cuda or "13.0"

# Compiles for the host what is no CUDA; waits while the file PAUSE exists.
NVCC = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {cuda}, V{cuda}.88"; exit ;;
  --dryrun) echo '#$ TOP={root}/bin/..' >&2; exit ;;
  --list-gpu-arch) printf 'compute_%s\\n' 80 87 90 100; exit ;;
esac
echo "$@" >> {root}/log
while [ -n "$PAUSE" ] && [ -e "$PAUSE" ]; do sleep 0.05; done
while [ $# -gt 0 ]; do
  case "$1" in -o) out=$2 ;; -c) source=$2 ;; esac
  shift
done
exec {host} -x c++ -MD -MF "$out.d" -fPIC -c "$source" -o "$out"
"""

# Links with no library: the stand-in needs none, and torch's and CUDA's may not be here.
CXX = """#!/bin/sh
for flag do
  shift
  case "$flag" in -l*) ;; *) set -- "$@" "$flag" ;; esac
done
exec {host} "$@"
"""

BINDINGS = """
#include <Python.h>
#define JOIN(a, b) a##b
#define INIT(name) JOIN(PyInit_, name)
#define QUOTE(a) #a
#define NAME(name) QUOTE(name)
static PyModuleDef module{PyModuleDef_HEAD_INIT, NAME(TORCH_EXTENSION_NAME), nullptr, -1};
PyMODINIT_FUNC INIT(TORCH_EXTENSION_NAME)() {
  PyObject* m = PyModule_Create(&module);
  PyModule_AddObject(m, "arch_list", Py_BuildValue("[ii]", 80, 90));
  return m;
}
"""

# A process that has the library, and says so.
PROCESS = """
import pathlib, torch
torch.version.cuda = {cuda!r}
from deco_kernels.host import library, toolchain
toolchain.folder = lambda: pathlib.Path({csrc!r})
print(library.library(80).arch_list)
"""


def fresh(monkeypatch):
    """``host/library.py`` in the state of a new process, and its ``toolchain``."""
    for module in (toolchain, library):
        spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        monkeypatch.setattr(host, spec.name.rpartition(".")[2], copy)  # where library finds it
    return host.library


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def machine(tmp_path, monkeypatch):
    """Has a toolkit, a torch for the same CUDA, and sources that compile fast."""
    host = shutil.which("c++")
    if host is None:
        pytest.skip("no C++ compiler")
    root = tmp_path / "cuda"
    executable(root / "bin" / "nvcc", NVCC.format(root=root, host=host, cuda=CUDA))
    for name in ("c++", "g++", "gcc"):
        executable(tmp_path / "host" / name, CXX.format(host=host))
    monkeypatch.setenv("PATH", str(tmp_path / "host"), prepend=os.pathsep)
    for name in ("CXX", "CUDA_PATH", "PYTORCH_NVCC", "PAUSE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(root))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    monkeypatch.setattr(torch.version, "cuda", CUDA)

    extension, csrc = fresh(monkeypatch), tmp_path / "csrc"
    toolchain = extension.toolchain
    csrc.mkdir()
    (csrc / "bindings.cpp").write_text(BINDINGS)
    # Torch builds a name once in a process: no two tests have the same sources.
    (csrc / "test.h").write_text(f"// {tmp_path}\n")
    for name in toolchain.SOURCES[1:]:
        (csrc / name).write_text(f"int {Path(name).stem};\n")
    toolchain.folder = lambda: csrc
    monkeypatch.setitem(sys.modules, toolchain.AHEAD_OF_TIME, None)  # a developer may have it

    def process(**environment):
        with open(tmp_path / "said", "a") as said:
            return subprocess.Popen(
                [sys.executable, "-c", PROCESS.format(csrc=str(csrc), cuda=CUDA)],
                cwd=REPOSITORY,
                env={**os.environ, **environment},
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )

    def said():
        """What those processes wrote to stderr, so far."""
        return (tmp_path / "said").read_text()

    def compiled():
        """Command lines of nvcc, so far."""
        log = root / "log"
        return log.read_text().splitlines() if log.exists() else []

    return SimpleNamespace(
        extension=extension,
        toolchain=toolchain,
        root=root,
        csrc=csrc,
        process=process,
        said=said,
        compiled=compiled,
        tmp=tmp_path,
    )
