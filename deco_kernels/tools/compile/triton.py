"""What do the Triton kernels take of a chip? The JIT compiles them, cuobjdump reports."""

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from ...backends import triton as verbs
from ...kernels.launch import Chip, Config, stand_in
from ...kernels.resources import SHARED_LIMIT, of_cubin, tensor_core
from ...stencil import Stencil
from ...tuning.table import made_with
from ..measure import float32_matmul
from . import Row, Step


class Compiled(NamedTuple):
    """A kernel as a launch compiles it."""

    kernel: str
    config: Config
    binary: Any  # triton's CompiledKernel


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """Shape, strides and the alignment of a fresh allocation: all that a launch is compiled for."""
    return torch.empty(shape, dtype=dtype, device="meta")


Geometry = tuple[tuple[int, int], tuple[int, int]]
# Windows are compiled whole or for any T, see compiled_window: backward a token is in one window of
# the first two, and in up to 4 of the last.
REGULAR: Geometry = (24, 24), (12, 12)  # windows of 4 tokens
THIRDS: Geometry = (24, 24), (8, 8)  # of 9 tokens
RAGGED: Geometry = (27, 27), (14, 14)  # of up to 9 tokens, overlapping
BATCH, CHANNELS, FEATURES = 8, 1024, 4096

COMPILER = f"Triton {triton.__version__}"
MOST_WORKERS = 8  # a worker holds about a gigabyte


def _pool(dtype: torch.dtype, out: torch.dtype, geometry: Geometry, backward: bool = False) -> None:
    table = Stencil.adaptive(*geometry).tables("meta", torch.float32)[backward]
    tokens = geometry[1 if backward else 0]
    verbs.pool(_meta(BATCH, tokens[0] * tokens[1], CHANNELS, dtype=dtype), table, out)


def _dact_pool(dtype: torch.dtype, geometry: Geometry, act: str) -> None:
    stencil = Stencil.adaptive(*geometry)
    dp, z = (_meta(BATCH, n, CHANNELS, dtype=dtype) for n in (stencil.n_out, stencil.n_in))
    verbs.dact_pool(dp, stencil.tables("meta", torch.float32)[1], z, act)


def _pool_linear(
    x: torch.dtype,
    w: torch.dtype,
    geometry: Geometry,
    activation: str | None,
    keep_z: bool,
    act: str | None = None,
) -> None:
    stencil = Stencil.adaptive(*geometry)
    verbs.pool_linear(
        _meta(BATCH, stencil.n_in, CHANNELS, dtype=x),
        stencil.tables("meta", torch.float32)[0],
        _meta(FEATURES, CHANNELS, dtype=w),
        _meta(FEATURES, dtype=w),
        activation,
        keep_z,
        act,
    )


def _dact_linear(dtype: torch.dtype, want_g: bool, want_db: bool) -> None:
    rows = BATCH * 144
    verbs.dact_linear(
        _meta(rows, FEATURES, dtype=dtype),
        _meta(FEATURES, FEATURES, dtype=dtype),
        _meta(rows, FEATURES, dtype=dtype),
        want_g,
        want_db,
    )


def _dgelu(dtype: torch.dtype, want_g: bool, want_db: bool) -> None:
    z = _meta(BATCH * 144, FEATURES, dtype=dtype)
    verbs.composed_dact_linear(z, _meta(FEATURES, FEATURES, dtype=dtype), z, want_g, want_db)


def cases() -> dict[str, Callable[[], None]]:
    """What ships, by name: calls of the verbs in every form that compiles to other code.

    Products of float32 are TF32 here; by IEEE rules they are cuBLAS's.
    """
    fp32, found = torch.float32, {}
    for name, product, dtype in (
        ("bf16", "bf16", torch.bfloat16),
        ("fp16", "fp16", torch.float16),
        ("fp32", "tf32", fp32),
    ):
        pool, linear = partial(_pool, dtype, dtype), partial(_pool_linear, dtype, dtype)
        found |= {
            f"{name} pool 576->144": partial(pool, REGULAR),
            f"{name} pool 576->144 backward": partial(pool, REGULAR, backward=True),
            f"{name} pool 729->196": partial(pool, RAGGED),
            f"{name} pool 729->196 backward": partial(pool, RAGGED, backward=True),
            f"{name} pool 576->64": partial(pool, THIRDS),
            f"{product} linear 576->144": partial(linear, REGULAR, None, True),
            f"{product} gelu 576->144": partial(linear, REGULAR, "gelu", True),
            f"{product} gelu 576->144 inference": partial(linear, REGULAR, "gelu", False),
            f"{product} gelu 729->196": partial(linear, RAGGED, "gelu", True),
            f"{product} gelu 576->64": partial(linear, THIRDS, "gelu", True),
            f"{product} act linear 576->144": partial(linear, REGULAR, None, True, "gelu"),
            f"{product} act linear 729->196": partial(linear, RAGGED, None, True, "gelu_tanh"),
            f"{name} act pool backward": partial(_dact_pool, dtype, RAGGED, "gelu"),
            f"{product} dz, g and db": partial(_dact_linear, dtype, True, True),
            f"{product} dz": partial(_dact_linear, dtype, False, False),
            f"{name} elementwise dz, g and db": partial(_dgelu, dtype, True, True),
            f"{name} elementwise dz": partial(_dgelu, dtype, False, False),
        }
        if dtype != fp32:  # tokens stay float32, the weights and their gradients do not
            linear = partial(_pool_linear, fp32, dtype)
            found[f"{name} autocast gelu 576->144"] = partial(linear, REGULAR, "gelu", True)
            found[f"{name} autocast backward"] = partial(_pool, dtype, fp32, REGULAR, backward=True)
    return found


class _Driver:
    """What the JIT asks of a driver to compile. An architecture is a device with its own cache."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def _driver_for(arch: int) -> Iterator[None]:
    before = driver._active  # `driver.active` would look for a GPU
    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        driver.set_active(before)


def problem(arch: int) -> str | None:
    """Why nothing can be compiled here for ``arch``; None if something can."""
    if triton.knobs.runtime.interpret:
        return "Triton's interpreter compiles nothing: unset TRITON_INTERPRET"
    return None


def compiled(case: str, arch: int) -> list[Compiled]:
    """Every launch of a case, compiled for ``arch`` by the JIT itself, so that this is what ships.

    Raises:
        RuntimeError: Triton is in its interpreter, which compiles nothing.
    """
    reason = problem(arch)
    if reason:
        raise RuntimeError(reason)
    found = []

    def compile_launch(
        kernel: Any, grid: tuple[int, ...], config: Config, args: dict[str, Any]
    ) -> None:
        binary = kernel.warmup(grid=grid, **args, **config.tiles, **config.options)
        found.append(Compiled(kernel.__name__.removesuffix("_kernel"), config, binary))

    chip = Chip(arch, sms=1)  # sms is for the size of the grid
    with _driver_for(arch), float32_matmul("tf32"), stand_in(chip, compile_launch):
        cases()[case]()
    return found


def rows(case: str, arch: int) -> list[Row]:
    """Compile a case for ``arch`` and read the binaries."""
    found = []
    for kernel, config, binary in compiled(case, arch):
        resources, ptx = of_cubin(binary.asm["cubin"]), binary.asm["ptx"]
        row = Row(
            kernel=kernel,
            backend="triton",
            arch=arch,
            config=str(config),
            registers=resources["REG"],
            spill_bytes=resources["STACK"] + resources["LOCAL"],
            shared_bytes=binary.metadata.shared,
            shared_limit=SHARED_LIMIT[arch],
            tensor_core=tensor_core(ptx),
            case=case,
            compiler=COMPILER,
        )
        found.append(row)
    return found


def count_steps(archs: Sequence[int]) -> int:
    return len(archs) * len(cases())


def steps(archs: Sequence[int]) -> Iterator[Step]:
    """Every case for every architecture, case by case; compiles on several cores."""
    tasks = [(case, arch) for arch in archs for case in cases()]
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    # Not forked: torch has threads by now.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        for i, found in enumerate(pool.map(rows, *zip(*tasks, strict=True))):
            yield Step(found, "" if i else said_of(archs))


def said_of(archs: Sequence[int]) -> str:
    """Which Triton compiles, whether the tiles were chosen with it, and what it must not do."""
    lines = [f"Triton kernels by {COMPILER}, tiles chosen with Triton {made_with()}"]
    refused = {arch: verbs.unfenced(arch) for arch in archs}
    lines += [f"sm_{arch}: no products: {reason}" for arch, reason in refused.items() if reason]
    return "\n".join(lines)
