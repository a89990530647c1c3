"""What if a name of torch that is not public is gone?

Every such name that the package uses is in this file, and in no other: why, since which version of
torch it exists, and what happens without it. A missing one disables the feature that needs it,
which ``explain`` says, and never the import of the package.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _module


class Feature(NamedTuple):
    """What needs private names of torch.

    Attributes:
        why: no public name does it.
        without: what happens where a name is missing.
        names: each with the version of torch since which it exists.
    """

    why: str
    without: str
    names: dict[str, str]


FEATURES = {
    "transforms": Feature(
        "no Function of ours survives torch.func and forward-mode differentiation, so where they "
        "are at work torch's own operators are called",
        "torch.func and forward-mode differentiation raise torch's own error",
        {
            "torch._C._are_functorch_transforms_active": "1.13",
            "torch.autograd.forward_ad._current_level": "1.8",
        },
    ),
    "modes": Feature(
        "a stencil's tables are kept for all callers, so none is made by the fake tensors or for "
        "the default device of the first one",
        "a stencil whose first use is under fake tensors or another mode is an error",
        {"torch.utils._python_dispatch._disable_current_modes": "2.0"},
    ),
    "global hooks": Feature(
        "a hook on all modules may change what a layer computes, whose weights we read",
        "nothing is fused: every layer is called as a module",
        {
            "torch.nn.modules.module._global_forward_hooks": "1.8",
            "torch.nn.modules.module._global_forward_pre_hooks": "1.8",
            "torch.nn.modules.module._global_backward_hooks": "1.8",
            "torch.nn.modules.module._global_backward_pre_hooks": "2.0",
        },
    ),
    "module state": Feature(
        "whether a layer is hooked, and its weights without the cost of looking up attributes",
        "nothing is fused: every layer is called as a module",
        {
            "torch.nn.Module()._parameters": "1.0",
            "torch.nn.Module()._buffers": "1.0",
            "torch.nn.Module()._modules": "1.0",
            "torch.nn.Module()._forward_hooks": "1.0",
            "torch.nn.Module()._forward_pre_hooks": "1.0",
            "torch.nn.Module()._backward_hooks": "1.0",
            "torch.nn.Module()._backward_pre_hooks": "2.0",
        },
    ),
    "later pooling": Feature(
        "a projector's output that a method of the model may still pool is a tensor that is not "
        "computed yet",
        "models that pool in a method of their own run their own code",
        {
            "torch._C.DisableTorchFunctionSubclass": "2.0",
            "torch._C._autograd._top_saved_tensors_default_hooks": "2.8",
            "torch.autograd.grad_mode._unsafe_preserve_version_counter": "2.0",
            "torch.utils._pytree.tree_leaves": "2.2",
            "torch.utils._pytree.tree_map": "2.3",  # with is_leaf
            "torch.utils._pytree.tree_map_only": "1.13",
            "torch.Tensor._make_wrapper_subclass": "1.11",
            "torch.Tensor._version": "1.0",
            "torch.ops.aten.add.Tensor._schema": "1.11",
        },
    ),
    "graphs": Feature(
        "Dynamo leaves a function alone, and need not be imported to be told so",
        "importing the package imports Dynamo, which takes a second",
        {"torch._compile._disable_dynamo": "2.1"},
    ),
    "GPU times": Feature(
        "a GPU that idles first lets the host queue its work, so that its overhead is not measured",
        "times of a GPU, in tune and report, have the host's overhead in them",
        {"torch.cuda._sleep": "1.0"},
    ),
}


def _find(path: str) -> Any:
    """What a path such as ``torch.nn.Module()._modules`` leads to; None if it leads nowhere."""
    found = torch
    for part in path.split(".")[1:]:
        found = getattr(found, part.removesuffix("()"), None)
        if part.endswith("()"):
            found = found()
    return found


_missing = {
    feature: [path for path in needs.names if _find(path) is None]
    for feature, needs in FEATURES.items()
}


def lacks(feature: str) -> str | None:
    """Why a feature is disabled; None if it is not."""
    if not _missing[feature]:
        return None
    names = ", ".join(_missing[feature])
    return f"torch {torch.__version__} has no {names}: {FEATURES[feature].without}"


def noted(reason: str) -> str:
    """A reason of ``explain``, and what this torch lacks."""
    return "; ".join([reason, *filter(None, map(lacks, FEATURES))])


# transforms

_functorch_active = _find("torch._C._are_functorch_transforms_active") or (lambda: False)


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work."""
    return getattr(forward_ad, "_current_level", -1) >= 0 or _functorch_active()


# modes

_disable_current_modes = _find("torch.utils._python_dispatch._disable_current_modes")


def no_modes() -> AbstractContextManager:
    """Leave the modes that change what torch's functions make, such as that of fake tensors.

    Raises:
        RuntimeError: there are some, and no way to leave them.
    """
    if _disable_current_modes is not None:
        return _disable_current_modes()
    made = torch.empty(0)
    if type(made) is not torch.Tensor or made.device.type != "cpu":
        raise RuntimeError(lacks("modes"))
    return nullcontext()


# hooks, and what modules are made of


_GLOBAL_HOOKS = [path.rpartition(".")[2] for path in FEATURES["global hooks"].names]


def foreign_global_hook() -> str | None:
    """Why all modules must be called: a hook of theirs that is not torch's own. None without one.

    Torch's own (FLOP counters, module and memory trackers) look on; others may change what a layer
    computes.
    """
    for name in _GLOBAL_HOOKS:
        for hook in getattr(_module, name, {}).values():
            owner = getattr(hook, "__module__", None) or type(hook).__module__
            if owner.partition(".")[0] != "torch":
                hooked = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"the global module hook {owner}.{hooked} is registered"
    return lacks("global hooks") or lacks("module state")


def hooked(module: nn.Module) -> bool:
    """Whether calling a module does more than its ``forward``, or that cannot be told."""
    own = module.__dict__
    return bool(
        own.get("_forward_hooks", True)
        or own.get("_forward_pre_hooks", True)
        or own.get("_backward_hooks", True)
        or own.get("_backward_pre_hooks", True)
    )


def parameters_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Its own, by name: the dict itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """Its own, by name: the dict itself."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Its own, by name, in order: the dict itself."""
    return module._modules


def rebuild(
    module: nn.Module, children: dict[str, nn.Module], buffers: dict[str, torch.Tensor | None]
) -> None:
    """Give a module other children and buffers, with no checks and no hooks called."""
    module.__dict__.update(_modules=dict(children), _buffers=buffers)


# later pooling

tree_leaves = _find("torch.utils._pytree.tree_leaves")
tree_map = _find("torch.utils._pytree.tree_map")
tree_map_only = _find("torch.utils._pytree.tree_map_only")
as_base_tensor = _find("torch._C.DisableTorchFunctionSubclass")  # a context
keep_version = _find("torch.autograd.grad_mode._unsafe_preserve_version_counter")  # a context
_top_hooks = _find("torch._C._autograd._top_saved_tensors_default_hooks")


def empty_wrapper(kind: type, shape: tuple[int, ...], **options: Any) -> torch.Tensor:
    """A tensor of a subclass, with no memory: ``options`` are dtype and device."""
    return torch.Tensor._make_wrapper_subclass(kind, shape, **options)


def version_of(tensor: torch.Tensor) -> int:
    """How often it was changed in place; a tensor of inference mode does not know."""
    return tensor._version


def writes(operator: Any) -> bool:
    """Whether an operator, as ``torch.ops.aten.add.Tensor``, changes a tensor in place."""
    return operator._schema.is_mutable


def saved_tensors_are_hooked() -> bool:
    return _top_hooks(True) is not None


# graphs

uncompiled = _find("torch._compile._disable_dynamo") or torch.compiler.disable


def constant_in_graphs(function: Callable) -> Callable:
    """``torch.compiler.assume_constant_result``, which would import Dynamo to set this mark."""
    function._dynamo_marked_constant = True
    return function


# What tensor subclasses have. A class without one is taken for an ordinary tensor.


def wraps_tensors(kind: type) -> bool:
    """Whether tensors of a class hold others, as a DTensor does: since 2.1."""
    return hasattr(kind, "__tensor_flatten__")


def fake_mode_of(x: torch.Tensor) -> Any:
    """The mode of a fake tensor, which has a shape and no numbers: since 1.13. None of others."""
    return None if type(x) is torch.Tensor else getattr(x, "fake_mode", None)


# GPU times

_sleep = _find("torch.cuda._sleep") or (lambda cycles: None)


def idle_gpu(cycles: int) -> None:
    """Queue some idling on the current GPU's stream."""
    _sleep(cycles)
