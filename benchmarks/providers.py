"""Who computes it? Every way to run a projector, and why one cannot run here."""

import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from cases import SHAPES, Mode, Shape
from work import DEVICE, DTYPE, Module

from deco_kernels import AvgPoolProjector, FusedAvgPoolProjector, Stencil, pool
from deco_kernels.backends import unusable


def eager(oracle: AvgPoolProjector, shape: Shape) -> Module:
    """The oracle, by torch's operators one after another; its ratio to itself is the noise."""
    return oracle


def compiled(oracle: AvgPoolProjector, shape: Shape) -> Module:
    """torch.compile of the oracle."""
    return _compile(oracle, "default")


def max_autotune(oracle: AvgPoolProjector, shape: Shape) -> Module:
    """torch.compile of the oracle, mode max-autotune."""
    return _compile(oracle, "max-autotune")


def _compile(oracle: AvgPoolProjector, mode: str) -> Module:
    torch.compiler.reset()  # else shapes compiled before count, to a limit and towards dynamic ones
    return torch.compile(oracle, fullgraph=True, dynamic=False, mode=mode)


def reshape_mean(oracle: AvgPoolProjector, shape: Shape) -> Module:
    """Tokens reshaped to windows, their mean, then the oracle's MLP."""
    side, window = shape.side_out, shape.side_in // shape.side_out

    def forward(x: torch.Tensor) -> torch.Tensor:
        windows = x.unflatten(1, (side, window, side, window))
        return oracle.mlp_projector(windows.mean((2, 4)).flatten(1, 2))

    return forward


def cublaslt_epilogue(oracle: AvgPoolProjector, shape: Shape) -> Module:
    """Our pool, then products with bias and tanh GELU (not the exact one) in cuBLASLt's epilogue.

    ``torch._addmm_activation`` has no derivative. On other devices its GELU is the exact one, and
    on a GPU it is a kernel of its own where cuBLASLt does not take the shape.
    """
    stencil = _stencil(shape)
    *hidden, last = (
        (linear.weight.detach(), linear.bias.detach()) for linear in oracle.mlp_projector[::2]
    )

    def forward(x: torch.Tensor) -> torch.Tensor:
        p = pool(x, stencil)
        y = p.flatten(0, 1)
        for weight, bias in hidden:
            y = torch._addmm_activation(bias, y, weight.T, use_gelu=True)
        return F.linear(y, *last).unflatten(0, p.shape[:2])

    return forward


def fused(oracle: AvgPoolProjector, shape: Shape, *, backend: str) -> Module:
    """The fused projector."""
    return FusedAvgPoolProjector.from_reference(oracle, backend=backend)


def _stencil(shape: Shape) -> Stencil:
    return Stencil.adaptive((shape.side_in,) * 2, (shape.side_out,) * 2)


PROVIDERS: dict[str, Callable[[AvgPoolProjector, Shape], Module]] = {
    "eager": eager,
    "compile": compiled,
    "compile-max-autotune": max_autotune,
    "reshape-mean": reshape_mean,
    "cublaslt-epilogue": cublaslt_epilogue,
    "ours-triton": partial(fused, backend="triton"),
    "ours-cuda": partial(fused, backend="cuda"),
    "ours-composed": partial(fused, backend="composed"),
    "ours-eager": partial(fused, backend="eager"),
}

# A CPU compiles for tens of seconds, so it does it once for each of these.
COMPILED_ON_CPU = SHAPES[0], ("forward", "step-frozen")
CPU_LIMIT = 50e9  # operations of one call: about a second of two cores


def describe(provider: str) -> str:
    """One line on what ``provider`` is."""
    build = PROVIDERS[provider]
    if isinstance(build, partial):
        return f"{build.func.__doc__.rstrip('.')}, backend {build.keywords['backend']}."
    return build.__doc__.partition("\n")[0]


def why_not(provider: str, shape: Shape, mode: Mode) -> str | None:
    """Why ``provider`` is not timed here; None if it is."""
    return too_long(shape, mode) or cannot(provider, shape, mode)


def too_long(shape: Shape, mode: Mode) -> str | None:
    """Why a case takes a CPU too long, whoever computes it."""
    if DEVICE.type != "cpu":
        return None
    if shape.batch > 1:
        return f"on a CPU only one image or one clip is measured, not {shape.batch}"
    if shape.flops(mode) > CPU_LIMIT:
        limit = f"the limit on a CPU is {CPU_LIMIT / 1e9:.0f}"
        return f"{shape.flops(mode) / 1e9:.0f} GFLOP a call, {limit}"
    return None


def cannot(provider: str, shape: Shape, mode: Mode) -> str | None:
    """Why ``provider`` does not run here, or takes too long to compile."""
    on_cpu = DEVICE.type == "cpu"
    if provider in ("ours-triton", "ours-cuda", "ours-composed"):
        backend = provider.removeprefix("ours-")
        return "it needs a CUDA device" if on_cpu else unusable(backend, DEVICE, DTYPE)
    if provider == "reshape-mean" and not shape.regular:
        return f"{shape.side_out} does not divide {shape.side_in}: windows are not regular"
    if provider == "cublaslt-epilogue":
        return _cannot_epilogue(shape, mode)
    if provider.startswith("compile") and on_cpu:
        return _cannot_compile_on_cpu(provider, shape, mode)
    return None


def _cannot_epilogue(shape: Shape, mode: Mode) -> str | None:
    if DEVICE.type == "cpu":
        return "cuBLASLt needs a CUDA device"
    if not hasattr(torch, "_addmm_activation"):
        return "this torch has no _addmm_activation"
    if shape.layers == 1:
        return "one layer has no GELU"
    return "_addmm_activation has no derivative" if mode.differentiates else None


def _cannot_compile_on_cpu(provider: str, shape: Shape, mode: Mode) -> str | None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler, which torch.compile needs on a CPU"
    if provider == "compile-max-autotune":
        return "max-autotune builds and tries many kernels: too long on a CPU"
    only_shape, only_modes = COMPILED_ON_CPU
    if shape != only_shape or str(mode) not in only_modes:
        return f"compiling takes long on a CPU: only {only_shape}, {' and '.join(only_modes)}"
    return None
