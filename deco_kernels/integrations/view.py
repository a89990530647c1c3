"""How does a model run its own code on a projector's output that is not finished?

Where the pooling is a method of the model, the code between projector and pooling, such as
``encode_images`` and what splits and sorts its result, is run as it is, but on a view of the model:
an object that shares the model's attributes and differs in two things. The projector returns its
last pre-activation, and the pooling method takes that. Whatever else touches it gets the
projector's output, as ever. So nothing of a model is known or copied but its pooling.
"""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from ..stencil import Stencil
from .swap import subclass
from .tail import Tail


class Unfinished:
    """A projector's output that is not computed before somebody wants more than to pool it."""

    __slots__ = ("_backend", "_tail", "_y", "_z")

    def __init__(self, last: Tail, z: torch.Tensor, backend: str) -> None:
        self._tail, self._z, self._backend, self._y = last, z, backend, None

    __class__ = property(lambda self: torch.Tensor)  # for isinstance

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._z.shape[:-1], self._tail.linear.out_features))

    def tensor(self) -> torch.Tensor:
        if self._y is None:
            self._y = self._tail.whole(self._z)
        return self._y

    def pooled(self, stencil: Stencil) -> torch.Tensor | None:
        """Pooled in front of the last layer; None if the output is already there."""
        return self._tail.pooled(self._z, stencil, self._backend) if self._y is None else None

    def split(self, sizes: int | list[int], dim: int = 0) -> tuple:
        if dim != 0 or self._y is not None:
            return self.tensor().split(sizes, dim)
        return tuple(Unfinished(self._tail, z, self._backend) for z in self._z.split(sizes))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.split and type(args[0]) is Unfinished:
            return args[0].split(*args[1:], **kwargs)
        return function(*map(finished, args), **{k: finished(v) for k, v in kwargs.items()})


def _operator(name: str) -> Callable:
    def operator(self, *args):
        return getattr(self.tensor(), name)(*map(finished, args))

    return operator


_OPERATORS = """
    getitem setitem len iter contains bool int float neg invert
    add sub mul truediv floordiv mod pow matmul and or eq ne lt le gt ge
    radd rsub rmul rtruediv rpow rmatmul iadd isub imul itruediv
"""
for _name in _OPERATORS.split():
    setattr(Unfinished, f"__{_name}__", _operator(f"__{_name}__"))
Unfinished.__hash__ = object.__hash__


def finished(value: Any) -> Any:
    """``value`` with tensors for what is unfinished in it, in lists and tuples too."""
    if type(value) is Unfinished:
        return value.tensor()
    if type(value) in (list, tuple):
        return type(value)(map(finished, value))
    return value


class Projector:
    """Stands for the projector in a view: what it returns is unfinished."""

    def __init__(self, module: nn.Module, last: Tail, backend: str) -> None:
        self._module, self._tail, self._backend = module, last, backend

    __class__ = property(lambda self: type(self._module))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor) or args[0].dim() != 3:
            return self._module(*args, **kwargs)
        return Unfinished(self._tail, self._tail.hidden(args[0]), self._backend)

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
    @wraps(stock)
    def pool(self, features, *args, **kwargs):
        if type(features) is Unfinished:
            stencil = kind.stencil(self, stock, features.shape[1], *args, **kwargs)
            pooled = None if stencil is None else features.pooled(stencil)
            if pooled is not None:
                return pooled
            features = features.tensor()
        return stock(self, features, *args, **kwargs)

    return pool
