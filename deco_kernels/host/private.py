"""What if a name of torch that is not public is gone?

Each with what it is for, since when it exists, and what happens without it.
"""

import torch
from torch.autograd import forward_ad
from torch.nn.modules import module as _module


def transforms_active() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is at work.

    No Function survives them. ``torch._C._are_functorch_transforms_active``, since 2.0, and
    ``torch.autograd.forward_ad._current_level``, since 1.8. Without them none is seen: torch then
    raises its own error.
    """
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    forward = getattr(forward_ad, "_current_level", -1) >= 0
    return forward or (active is not None and active())


_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


def foreign_global_hook() -> str | None:
    """Why all modules must be called: a hook of theirs that is not torch's own. None without one.

    Torch's own (FLOP counters, module and memory trackers) look on; others may change what a layer
    computes. The registries of ``torch.nn.modules.module``, since 1.9, 2.0 for the last. Without
    them no hook is seen.
    """
    for name in _HOOKS:
        for hook in getattr(_module, name, {}).values():
            owner = getattr(hook, "__module__", None) or type(hook).__module__
            if owner.partition(".")[0] != "torch":
                hooked = getattr(hook, "__qualname__", type(hook).__qualname__)
                return f"the global module hook {owner}.{hooked} is registered"
    return None
