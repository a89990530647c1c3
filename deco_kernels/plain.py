"""Is a module still what it was made as? Then its weights may be read without calling it."""

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

_ORDINARY = (nn.Parameter, torch.Tensor)


def hooked_globally() -> bool:
    """Whether a hook is registered that every module's call must run."""
    return _has_any_global_hook()


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` does what ``kind`` does and nothing else."""
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def difference(module: nn.Module, kind: type[nn.Module]) -> str:
    """Why a module is not :func:`plain`, to follow its name."""
    if type(module) is kind:
        return "is hooked"
    name = type(module).__name__  # PEFT's linear layer is called Linear too
    return f"is {type(module).__module__}.{name}" if name == kind.__name__ else f"is {name}"


def materialised(linear: nn.Linear) -> bool:
    """Whether the parameters are ordinary tensors that are there in full."""
    p = linear._parameters
    return (
        type(p.get("weight")) in _ORDINARY
        and type(p.get("bias", ...)) in (*_ORDINARY, type(None))  # a buffer in its place is none
        and p["weight"].numel() == linear.out_features * linear.in_features
    )
