"""Is it what it seems? Of a module then the weights may be read without calling it."""

import torch
from torch import nn

from ..functional.inputs import ORDINARY
from ..host.private import fake_mode_of, hooked, parameters_of


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does and nothing else."""
    return type(module) is kind and "forward" not in module.__dict__ and not hooked(module)


def difference(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why a module is not :func:`plain`, to follow its name."""
    if type(module) is kind:
        return "is hooked"
    name = type(module).__name__  # PEFT's linear layer is called Linear too
    return f"is {type(module).__module__}.{name}" if name == kind.__name__ else f"is {name}"


def _owns_numbers(parameter: torch.Tensor | None) -> bool:
    return type(parameter) in ORDINARY or fake_mode_of(parameter) is not None  # torch.export's


def materialised(linear: nn.Linear) -> bool:
    """Whether the parameters are ordinary tensors that are there in full."""
    p = parameters_of(linear)
    return (
        _owns_numbers(p.get("weight"))
        and (p.get("bias", ...) is None or _owns_numbers(p.get("bias")))  # a buffer is none
        and p["weight"].numel() == linear.out_features * linear.in_features
    )
