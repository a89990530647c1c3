"""How does a model run its own code on a projector's output that is not finished?

Where the pooling is a method of the model, the code between projector and pooling, such as
``encode_images`` and what splits and sorts its result, is run as it is, but on a view of the model:
an object that shares the model's attributes and differs in two things. The projector returns its
last pre-activation, and the pooling method takes that. Whatever else touches it gets the
projector's output, as ever. So nothing of a model is known or copied but its pooling.
"""

import inspect
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ..functional import autocast_dtype
from ..host.private import transforms_active
from .swap import note, subclass
from .tail import Tail
from .unfinished import Modes, Unfinished


class Projector:
    """Stands for the projector in a view: what it returns is unfinished."""

    def __init__(self, module: nn.Module, last: Tail, backend: str) -> None:
        self._module, self._tail, self._backend = module, last, backend

    __class__ = property(lambda self: type(self._module))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
            return self._module(*args, **kwargs)
        z = self._tail.hidden(args[0])
        if (
            type(z) not in (torch.Tensor, nn.Parameter)  # sharded, fake or the like
            or getattr(self._tail.act, "inplace", False)
            or transforms_active()
        ):
            return self._tail.whole(z)
        modes = Modes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            autocast_dtype(z),
        )
        return Unfinished.of(self._tail, z, self._backend, modes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __getitem__(self, index: Any) -> Any:
        return self._module[index]


class View:
    """In front of a model's class, for objects that share the model's attributes."""

    __slots__ = ()

    @classmethod
    def of(cls, model: nn.Module, original: type, projector: Projector, *arguments) -> nn.Module:
        view = object.__new__(cls.view_class(original, *arguments))
        object.__setattr__(view, "__dict__", model.__dict__)
        object.__setattr__(view, "deco_projector", projector)
        return view

    @staticmethod
    @cache
    def view_class(original: type, attribute: str | None, pool: str | None, kind: type) -> type:
        body: dict[str, Any] = {"__slots__": ("deco_projector",)}
        if pool is not None:
            body[pool] = _pool_method(getattr(original, pool), kind)
        if attribute is None:
            body["get_model"] = _get_model(original.get_model, kind)
        else:
            body[attribute] = property(lambda self: self.deco_projector)
        return subclass(original, View, body)


def _get_model(stock: Callable, kind: type) -> Callable:
    def get_model(self):
        inner = stock(self)
        return View.of(inner, type(inner), self.deco_projector, kind.projector, None, kind)

    return get_model


def _pool_method(stock: Callable, kind: type) -> Callable:
    signature = inspect.signature(stock)
    _, tokens, *_ = signature.parameters

    @wraps(stock)
    def pool(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        features = given.arguments.get(tokens)
        if type(features) is Unfinished:
            stencil = kind.stencil(self, stock, features.shape[1], *given.args[2:], **given.kwargs)
            pooled = None if stencil is None else features.pooled(stencil)
            if pooled is not None:
                note(self, "fused")
                return pooled
        return stock(self, *args, **kwargs)

    return pool
