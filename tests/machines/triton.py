"""Where do the kernels run without a GPU? As compiled PTX in the simulator, also with mutants."""

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ptxsim
import pytest
import torch

import deco_kernels.kernels
from deco_kernels.backends.triton import unfenced
from deco_kernels.kernels.launch import Chip, stand_in

try:
    import triton
except ImportError:
    INTERPRETING = False
else:
    INTERPRETING = triton.knobs.runtime.interpret

_SOURCE = Path(deco_kernels.kernels.__file__).parent
_copies = itertools.count()


class Copy:
    """A copy of the kernels' source, imported from deco_kernels under a name of its own.

    ``edits`` maps texts of ``file``, each of which must occur once, to others: a mutant.
    """

    def __init__(self, folder: Path, file: str, edits: dict[str, str]) -> None:
        name = f"kernels_copy_{next(_copies)}"
        package = folder / name
        shutil.copytree(_SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
        text = (package / file).read_text()
        for old, new in edits.items():
            assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
            text = text.replace(old, new)
        (package / file).write_text(text)
        deco_kernels.__path__.append(str(folder))  # beside what the kernels import
        try:
            self.modules = [
                importlib.import_module(f"deco_kernels.{name}.{path.stem}")
                for path in package.glob("[!_]*.py")
            ]
        finally:
            deco_kernels.__path__.remove(str(folder))

    def __getitem__(self, name: str) -> object:
        """The kernel of that name."""
        return next(getattr(m, name) for m in self.modules if hasattr(m, name))


@contextmanager
def simulated(arch: int, copy: Copy | None = None, sms: int = 2, **how) -> Iterator[list]:
    """Launches run as compiled PTX of sm_``arch`` on the CPU; yields the list of their statistics.

    ``how`` are options of ``ptxsim.run_triton``; by default CTAs run one after another and races
    are looked for.
    """
    pytest.importorskip("triton")
    launches = []

    def launch(kernel, grid, config, args):
        kernel = copy[kernel.__name__] if copy else kernel
        stats = ptxsim.run_triton(
            kernel,
            grid,
            args,
            config.tiles,
            target_sm=arch,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **how,
        )
        stats.kernel, stats.args, stats.config, stats.grid = kernel.__name__, args, config, grid
        launches.append(stats)

    with stand_in(Chip(arch, sms), launch):
        yield launches


def require_products(arch: int) -> None:
    """Skip the test where this Triton must not multiply on ``arch``."""
    reason = unfenced(arch)
    if reason:
        pytest.skip(reason)


def version(module) -> tuple[int, int]:
    return tuple(map(int, module.__version__.split(".")[:2]))


def require_interpreter() -> None:
    """Skip the test where Triton's interpreter cannot run a loop of run-time length."""
    import numpy

    if version(triton) < (3, 7) and version(numpy) >= (2, 4):
        pytest.skip("the interpreter of Triton before 3.7 takes no numpy of 2.4 or later")


def interpreted(file: str, *options: str) -> subprocess.CompletedProcess:
    """The tests of ``file`` once more, in a process whose kernels are interpreted (wall 1).

    Triton decides on import which it is.
    """
    pytest.importorskip("triton")
    require_interpreter()
    return subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider", *options],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )


@contextmanager
def launch_keys(arch: int = 90) -> Iterator[list]:
    """Launches run nowhere; yields a list of their kernels and of what the JIT compiles them by."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend, keys = make_backend(GPUTarget("cuda", arch, 32)), []

    def launch(kernel, grid, config, args):
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, options = bind(**args, **config.tiles, **config.options)
        keys.append((kernel.__name__, str((specialization, options))))

    with stand_in(Chip(arch, sms=132), launch):
        yield keys


class Tf32Linear(torch.nn.Linear):
    """A linear layer that multiplies as TF32 tensor cores do: the low 13 bits are cut off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float64:
            return super().forward(x)
        return _Tf32.apply(x, self.weight) + self.bias

    @classmethod
    def replace_in(cls, module: torch.nn.Module) -> None:
        for child in module.modules():
            if type(child) is torch.nn.Linear:
                child.__class__ = cls


def _cut(t: torch.Tensor) -> torch.Tensor:
    return (t.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


class _Tf32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return _cut(x) @ _cut(w).T

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dw = _cut(dy).flatten(0, 1).T @ _cut(x).flatten(0, 1)
        return _cut(dy) @ _cut(w), dw
