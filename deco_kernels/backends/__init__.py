"""Who computes it? Chooses a backend and says why."""

from types import ModuleType
from typing import NamedTuple

import torch

from ..host import library
from ..host.private import constant_in_graphs
from ..kernels.launch import chip_of
from ..tuning.call import Call
from ..tuning.decide import ranking
from . import composed, cuda, eager, triton

BACKENDS = ("auto", "triton", "cuda", "composed", "eager")
_MODULES: dict[str, ModuleType] = {
    "triton": triton,
    "cuda": cuda,
    "composed": composed,
    "eager": eager,
}


class Choice(NamedTuple):
    """The backend of a call, and why that one."""

    backend: str
    reason: str


_ON_CPU = Choice("eager", "the tokens are on the CPU")


def get(backend: str) -> ModuleType:
    """The module with the verbs ``pool``, ``dact_pool``, ``pool_linear`` and ``dact_linear``."""
    return _MODULES[backend]


def unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run on tensors of that device and dtype; None if it can."""
    return _MODULES[backend].unusable(device, dtype)


@constant_in_graphs
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Resolve ``backend`` for tensors of a device and dtype.

    "auto" is "eager" where none of our kernels can run, and else stays "auto": who is fastest
    depends on sizes, and :func:`fastest` says it when they are known.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend that was asked for cannot run here; says what is missing.
    """
    if backend == "eager":
        return Choice("eager", "asked for")
    if backend == "auto" and device.type == "cpu":
        return _ON_CPU
    check_backend(backend)
    if backend != "auto":
        problem = unusable(backend, device, dtype)
        if problem:
            raise RuntimeError(f"backend {backend!r} cannot run here: {problem}")
        return Choice(backend, "asked for")
    kernels, reason = preferred(device, dtype)
    if kernels == "cuda":
        problem = _not_built(device)
        if problem:
            return Choice("eager", f"{reason}, but {problem}")
    return Choice("eager" if kernels == "eager" else "auto", reason)


def preferred(device: torch.device, dtype: torch.dtype) -> Choice:
    """Whose kernels "auto" takes for tensors of a device and dtype, if they can be built."""
    if device.type == "cpu":
        return _ON_CPU
    problems = []
    for name in ("triton", "cuda"):
        problem = unusable(name, device, dtype)
        if not problem:
            return Choice(name, "; ".join([*problems, f"{name} is usable on {device}"]))
        problems.append(f"not {name}: {problem}")
    return Choice("eager", "; ".join(problems))


def fastest(device: torch.device, call: Call) -> Choice:
    """What "auto" takes for a call on a CUDA device: as measured there by ``tune``, or predicted.

    Measures and builds nothing. The file of measurements is read once.
    """
    kernels = preferred(device, call.dtype).backend
    if kernels == "eager" or not get(kernels).fuses(device, call.dtype):
        # All that is ours there is the pooling and the elementwise kernels.
        unfenced = triton.no_products(device) if kernels == "triton" else None
        return Choice(kernels, unfenced or f"only {kernels} has kernels for it")
    order, reason = ranking(device.index, kernels, call)
    for backend in order:
        if _runs(backend, device, kernels, call.dtype):
            return Choice(backend, reason)
    return Choice("composed", "nothing is known of this GPU, or of who can run here")


def _runs(backend: str, device: torch.device, kernels: str, dtype: torch.dtype) -> bool:
    """Whether ``backend`` can start now, and compiles no library for that."""
    if backend == "cuda" and kernels != "cuda":
        return not cuda.unusable(device, dtype) and library.built(chip_of(device).arch)
    return backend in (kernels, "composed", "eager")


def _not_built(device: torch.device) -> str | None:
    """Why the CUDA library is not there and cannot be built for ``device``; None if it is there."""
    try:
        cuda.prepare(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend
