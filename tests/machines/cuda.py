"""Where do the CUDA C++ kernels run without a GPU? Compiled for the CPU, or as nvcc's PTX.

In both the shipped bindings check and pack the arguments, on CPU tensors; both machines take
launches from them. A folder with an edited copy of ``csrc`` makes a mutant.
"""

import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from ptxsim import Sim, compile_cuda
from ptxsim.launch import HostArrays, parse
from torch.utils.cpp_extension import include_paths

from deco_kernels.host import library, toolchain
from deco_kernels.kernels.launch import Chip, stand_in

CSRC = toolchain.folder()
HERE = Path(__file__).parents[1] / "cuda_host"
KERNELS = tuple(name for name in toolchain.SOURCES if name.endswith(".cu"))
NAME = "deco_kernels_on_host"
COMPILER = os.environ.get("CXX", "g++")
SANITIZE = "DECO_KERNELS_TESTS_SANITIZE"  # in the environment: build with the sanitizers
FLAGS = ["-O1", "-g", "-fsanitize=address,undefined"] if os.environ.get(SANITIZE) else ["-O2"]

ON_LAUNCH = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_void_p,
    ctypes.c_size_t,
)


def require_compilers(ptx: bool = False) -> None:
    """Skip the test where they are missing."""
    for program in (COMPILER, "nvcc") if ptx else (COMPILER,):
        if not shutil.which(program):
            pytest.skip(f"no {program}")


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="deco_kernels_tests_")


def _new_folder() -> Path:
    return Path(tempfile.mkdtemp(dir=_scratch().name))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


def _compile(source: Path, out: Path, *flags: str) -> None:
    _run([COMPILER, "-fPIC", "-pthread", *flags, "-c", str(source), "-o", str(out)])


def _link(objects: list[Path], out: Path, *flags: str) -> None:
    _run([COMPILER, "-shared", "-pthread", *map(str, objects), *flags, "-o", str(out)])


@functools.cache
def _bindings() -> ctypes.CDLL:
    """The shipped bindings for CPU tensors, and the switch behind them."""
    folder = _new_folder()
    objects = [folder / "bindings.o", folder / "switch.o"]
    includes = [*include_paths(), sysconfig.get_paths()["include"], str(CSRC)]
    flags = ["-O1", "-std=c++20", "-DDECO_ON_HOST", f"-DTORCH_EXTENSION_NAME={NAME}"]
    flags += toolchain.facts("")
    flags += [f"-I{path}" for path in includes]
    with ThreadPoolExecutor() as pool:
        sources = [CSRC / "bindings.cpp", HERE / "switch.cpp"]
        list(pool.map(_compile, sources, objects, *([flag] * 2 for flag in flags)))
    shared = folder / "bindings.so"
    torch_lib = Path(torch.__file__).parent / "lib"
    _link(objects, shared, f"-L{torch_lib}", f"-Wl,-rpath,{torch_lib}", *_TORCH)
    torch.ops.load_library(shared)
    return ctypes.CDLL(str(shared))


_TORCH = ("-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python")


def _sources(csrc: Path) -> dict[str, str]:
    """A digest for every file of kernels, of it and of the headers: what it is compiled from."""
    headers = b"".join(path.read_bytes() for path in sorted(csrc.glob("*.*h")))
    return {n: hashlib.sha256((csrc / n).read_bytes() + headers).hexdigest() for n in KERNELS}


_objects: dict[str, Path] = {}


@functools.cache
def host_kernels(csrc: Path = CSRC) -> ctypes.CDLL:
    """The kernels of ``csrc``, compiled for the CPU."""
    folder = _new_folder()
    common = ["-x", "c++", "-std=c++17", "-fno-gnu-unique", "-ffp-contract=off"]
    common += ["-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas", *FLAGS]
    common += [f"-I{HERE}", f"-I{csrc}"]

    def compiled(source: tuple[str, str]) -> Path:
        name, digest = source
        if digest not in _objects:
            out = folder / f"{name}.o"
            _compile(csrc / name, out, *common)
            _objects[digest] = out
        return _objects[digest]

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, _sources(csrc).items()))
    library = folder / "kernels.so"
    _link(objects, library, "-Wl,-Bsymbolic", *FLAGS)
    return ctypes.CDLL(str(library))


_texts: dict[tuple[str, int], str] = {}


@functools.cache
def ptx(arch: int, csrc: Path = CSRC) -> dict[str, str]:
    """PTX by nvcc for sm_``arch``: of every kernel, by its symbol, the text of its file."""

    def compiled(source: tuple[str, str]) -> str:
        name, digest = source
        if (digest, arch) not in _texts:
            _texts[digest, arch] = compile_cuda(csrc / name, arch)
        return _texts[digest, arch]

    with ThreadPoolExecutor() as pool:
        texts = list(pool.map(compiled, _sources(csrc).items()))
    return {symbol: text for text in texts for symbol in re.findall(r"\.entry (\w+)", text)}


class Operators:
    """The operators of the bindings, as ``library.operators`` gives them."""

    def __init__(self, kernels: ctypes.CDLL) -> None:
        self._switch, self._kernels = _bindings(), kernels

    def __getattr__(self, name: str) -> object:
        operator = getattr(getattr(torch.ops, NAME), name)

        def call(*args: object) -> object:
            self._switch.deco_choose(ctypes.c_void_p(self._kernels._handle))
            return self._launching(operator, args)

        return call

    def _launching(self, operator, args):
        return operator(*args)


class OnPtx(Operators):
    """The same, but launches run as PTX in the simulator; keeps their statistics."""

    def __init__(self, arch: int, csrc: Path, how: dict[str, object]) -> None:
        super().__init__(host_kernels())
        self.ptx, self.how, self.launches = ptx(arch, csrc), how, []

    def _launching(self, operator, args):
        recorded = []

        @ON_LAUNCH
        def record(symbol, grid, threads, shared, argument, size):
            params = bytearray(ctypes.string_at(argument, size))
            recorded.append((symbol.decode(), tuple(grid[:3]), threads, shared, params))

        self._kernels.cuda_host_on_launch(record)
        try:
            result = operator(*args)
        finally:
            self._kernels.cuda_host_on_launch(None)
        for launch in recorded:
            self.launches.append(self._simulate(args, *launch))
        return result

    def _simulate(self, args, symbol, grid, threads, shared, params):
        sim = Sim(parse(self.ptx[symbol]))
        memory = HostArrays(sim)
        tensors = [t for t in args if isinstance(t, torch.Tensor)]
        for i, name in enumerate(_pointers()):
            place = slice(8 * i, 8 * i + 8)
            address = int.from_bytes(params[place], "little")
            if address:
                (tensor,) = {t.data_ptr(): t for t in tensors if t.data_ptr() == address}.values()
                params[place] = memory.pointer(tensor, name).tobytes()
        try:
            stats = sim.launch(symbol, grid, threads, [params], shared, **self.how)
        finally:
            memory.write_back()
        stats.kernel = re.match(r"_ZN4deco\d+(\w+?)_kernel", symbol)[1]
        stats.grid, stats.shared_bytes = grid, shared
        return stats


@functools.cache
def _pointers() -> list[str]:
    """The pointers at the beginning of the parameters, in order."""
    return re.findall(r"^  (?:const )?\w+\* (\w+);", (CSRC / "params.h").read_text(), re.M)


def _no_triton(*launch: object) -> None:
    raise AssertionError("this was to be launched by CUDA C++")


@contextmanager
def on_host(
    seed: int = 0,
    resident: int = 1,
    kernels: ctypes.CDLL | None = None,
    sms: int = 2,
) -> Iterator[list]:
    """Launches run on the CPU, ``resident`` blocks at a time in an order drawn from ``seed``."""
    kernels = kernels or host_kernels()
    kernels.cuda_host_schedule(ctypes.c_long(seed), resident)
    with stand_in(Chip(80, sms), _no_triton), library.stand_in(Operators(kernels)):
        yield []


@contextmanager
def on_ptx(arch: int, csrc: Path = CSRC, sms: int = 2, **how: object) -> Iterator[list]:
    """Launches run as nvcc's PTX for sm_``arch``; yields the list of their statistics.

    ``how`` are options of ``Sim.launch``; by default blocks run one after another and races are
    looked for.
    """
    operators = OnPtx(arch, csrc, {"race": True, **how})
    with stand_in(Chip(arch, sms), _no_triton), library.stand_in(operators):
        yield operators.launches


_copies = itertools.count()


def mutant(folder: Path, file: str, edits: dict[str, str], origin: Path = CSRC) -> Path:
    """A copy of ``csrc``; ``edits`` maps texts of ``file``, found once each, to others."""
    csrc = folder / f"csrc{next(_copies)}"
    shutil.copytree(origin, csrc)
    text = (csrc / file).read_text()
    for old, new in edits.items():
        assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
        text = text.replace(old, new)
    (csrc / file).write_text(text)
    return csrc
