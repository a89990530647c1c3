"""How does an MLP end? With an activation and a linear layer, which pooling may go before."""

from typing import NamedTuple

import torch
from torch import nn

from .. import functional
from ..host.private import children_of, foreign_global_hook, parameters_of
from ..projector.layers import difference, materialised, plain
from ..stencil import Stencil
from .swap import random_tokens

ACTIVATION_NAMES = ("gelu", "act", "act_fn", "activation")
# Classes of transformers.activations, by name: that library is not imported here.
_HUGGING_FACE = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "SiLUActivation": "silu",
    "QuickGELUActivation": "quick_gelu",
}


class Tail(NamedTuple):
    """The layers of an MLP before its last activation, that activation, and the last layer."""

    before: tuple[nn.Module, ...]
    act: nn.Module | None
    activation: str | None
    linear: nn.Linear

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """The last pre-activation [B, n, K]."""
        for layer in self.before:
            x = layer(x)
        return x

    def whole(self, z: torch.Tensor) -> torch.Tensor:
        """The MLP's output for the pre-activation."""
        return self.linear(z if self.act is None else self.act(z))

    def pooled(self, z: torch.Tensor, stencil: Stencil, backend: str) -> torch.Tensor:
        """The MLP's output, pooled; the last product is done on pooled tokens."""
        p = parameters_of(self.linear)
        return functional.act_pool_linear(
            z, p["weight"], p["bias"], stencil, self.activation, backend=backend
        )


def activation_name(module: nn.Module) -> str | None:
    """What ``functional.act_pool_linear`` calls an activation; None if it does not know it."""
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind is nn.SiLU:
        return "silu"
    if kind.__module__ == "transformers.activations":
        return _HUGGING_FACE.get(kind.__name__)
    return None


def layers(mlp: nn.Module) -> dict[str, nn.Module] | None:
    """The layers of an MLP in order, by name; None if it has no known form."""
    if type(mlp) is nn.Linear:
        return {"": mlp}
    children = children_of(mlp)
    if type(mlp) is nn.Sequential:
        return dict(children)
    act = next((name for name in ACTIVATION_NAMES if name in children), None)
    names = ("linear_1", act, "linear_2")
    found = {name: children.get(name) for name in names}
    return None if None in found.values() else found


def kinds(mlp: nn.Module) -> tuple[type, ...]:
    """The types of the layers, to see later whether one was exchanged."""
    return tuple(map(type, layers(mlp).values()))


def read(mlp: nn.Module, seen: tuple[type, ...] | None = None) -> Tail | str:
    """The tail of an MLP; a reason if a layer must be called and its weights not read.

    Args:
        mlp: a module that :func:`layers` knows.
        seen: the types that its layers must have.
    """
    problem = foreign_global_hook()
    if problem:
        return problem
    found = layers(mlp)
    if found is None or not len(found) % 2:
        return "it does not end with a linear layer"
    if seen is not None and len(found) != len(seen):
        return f"it has {len(found)} layers now"
    for i, (name, layer) in enumerate(found.items()):
        kind = nn.Linear if i % 2 == 0 else type(layer) if seen is None else seen[i]
        if not plain(layer, kind):
            return f"{name or 'it'} {difference(layer, kind)}"
        if kind is nn.Linear and not materialised(layer):
            return f"{name or 'it'} has partitioned or special parameters"
        if i % 2 and activation_name(layer) is None:
            return f"the activation {type(layer).__name__} is not known here"
    *before, linear = found.values()
    if not before:
        return Tail((), None, None, linear)
    *before, act = before
    return Tail(tuple(before), act, activation_name(act), linear)


def tiny(mlp: nn.Module) -> dict[str, nn.Module]:
    """Layers like those of ``mlp``, with 3, 5, 5 ... and 4 channels, in float64 on the CPU."""
    found = layers(mlp)
    made = {}
    for i, (name, layer) in enumerate(found.items()):
        if i % 2:
            made[name] = layer
            continue
        n_in, n_out = 3 if i == 0 else 5, 4 if i == len(found) - 1 else 5
        made[name] = linear = nn.Linear(n_in, n_out, layer.bias is not None, device="meta")
        for key, p in list(linear.named_parameters()):
            setattr(linear, key, nn.Parameter(random_tokens(*p.shape)))
    return made
