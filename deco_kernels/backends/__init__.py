"""Who computes it? Chooses a backend and says why."""

from types import ModuleType
from typing import NamedTuple

import torch

from . import cuda, eager, triton

BACKENDS = ("auto", "triton", "cuda", "eager")
_MODULES: dict[str, ModuleType] = {"triton": triton, "cuda": cuda, "eager": eager}


class Choice(NamedTuple):
    """The backend of a call, and why that one."""

    backend: str
    reason: str


def get(backend: str) -> ModuleType:
    """The module with the verbs ``pool``, ``pool_linear`` and ``dact_linear``."""
    return _MODULES[backend]


def unusable(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run on tensors of that device and dtype; None if it can."""
    return _MODULES[backend].unusable(device, dtype)


@torch.compiler.assume_constant_result
def choose(backend: str, device: torch.device, dtype: torch.dtype) -> Choice:
    """Resolve ``backend`` for tensors of a device and dtype.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend that was asked for cannot run here; says what is missing.
    """
    if backend == "eager":
        return Choice("eager", "asked for")
    check_backend(backend)
    if backend != "auto":
        problem = unusable(backend, device, dtype)
        if problem:
            raise RuntimeError(f"backend {backend!r} cannot run here: {problem}")
        return Choice(backend, "asked for")
    choice = preferred(device, dtype)
    if choice.backend == "cuda":
        try:
            cuda.prepare(device)
        except RuntimeError as error:
            line = str(error).partition("\n")[0]
            return Choice("eager", f"{choice.reason}, but {line}")
    return choice


def preferred(device: torch.device, dtype: torch.dtype) -> Choice:
    """What "auto" takes for tensors of a device and dtype, if what it takes can be built."""
    if device.type == "cpu":
        return Choice("eager", "the tokens are on the CPU")
    problems = []
    for name in ("triton", "cuda"):
        problem = unusable(name, device, dtype)
        if not problem:
            return Choice(name, "; ".join([*problems, f"{name} is usable on {device}"]))
        problems.append(f"not {name}: {problem}")
    return Choice("eager", "; ".join(problems))


def check_backend(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    return backend
