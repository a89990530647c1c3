"""How does a model run its own code on a projector's output that is not finished?

Where the pooling is a method of the model, the code between projector and pooling, such as
``encode_images`` and what splits and sorts its result, is run as it is, but on a view of the model:
an object that shares the model's attributes and differs in two things. The projector returns its
last pre-activation, and the pooling method takes that. Whatever else touches it gets the
projector's output, as ever. So nothing of a model is known or copied but its pooling.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..functional import autocast_dtype
from ..stencil import Stencil
from .swap import subclass
from .tail import Tail


class Unfinished:
    """A projector's output that is not computed before somebody wants more than to pool it.

    It is computed as it would have been: in the grad and autocast modes of the projector's call.
    """

    __slots__ = ("_autocast", "_backend", "_tail", "_tracked", "_y", "_z")

    def __init__(self, last: Tail, z: torch.Tensor, backend: str) -> None:
        self._tail, self._z, self._backend, self._y = last, z, backend, None
        self._tracked, self._autocast = torch.is_grad_enabled(), autocast_dtype(z)

    __class__ = property(lambda self: torch.Tensor)  # for isinstance

    def tensor(self) -> torch.Tensor:
        if self._y is None:
            with self._modes(self._tracked):
                self._y = self._tail.whole(self._z)
        return self._y

    def pooled(self, stencil: Stencil) -> torch.Tensor | None:
        """Pooled in front of the last layer; None if the output is already there."""
        if self._y is not None:
            return None
        with self._modes(self._tracked and torch.is_grad_enabled()):
            return self._tail.pooled(self._z, stencil, self._backend)

    def split(self, sizes: int | list[int], dim: int = 0) -> tuple:
        if dim != 0 or self._y is not None:
            return self.tensor().split(sizes, dim)
        with self._modes(self._tracked):
            return tuple(Unfinished(self._tail, z, self._backend) for z in self._z.split(sizes))

    @contextmanager
    def _modes(self, tracked: bool) -> Iterator[None]:
        other: AbstractContextManager = nullcontext()
        if autocast_dtype(self._z) != self._autocast:
            on = self._autocast is not None
            other = torch.autocast(self._z.device.type, self._autocast, on)
        with torch.set_grad_enabled(tracked), other:
            yield

    def _like(self) -> torch.Tensor:
        """A tensor of the output's shape, dtype and device, whose elements are one in memory."""
        linear = self._tail.linear
        one = self._z.new_empty((), dtype=self._autocast or self._z.dtype)
        like = one.expand(*self._z.shape[:-1], linear.out_features)
        tracked = self._z.requires_grad or any(p.requires_grad for p in linear.parameters())
        return like.requires_grad_(self._tracked and tracked)

    def __len__(self) -> int:
        return self.shape[0]

    def __getattr__(self, name: str) -> Any:
        known = name in _KNOWN and self._y is None
        return getattr(self._like() if known else self.tensor(), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in Unfinished.__slots__:
            object.__setattr__(self, name, value)
        else:
            setattr(self.tensor(), name, value)

    def __reduce_ex__(self, protocol: int) -> tuple:
        return self.tensor().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.split and type(args[0]) is Unfinished:
            return args[0].split(*args[1:], **kwargs or {})
        return function(*finished(args), **finished(kwargs or {}))


_KNOWN = ("shape", "dtype", "device", "ndim", "dim", "size", "requires_grad")


def _operator(name: str) -> Callable:
    def operator(self, *args, **kwargs):
        return getattr(self.tensor(), name)(*finished(args), **kwargs)

    return operator


_OPERATORS = """
    getitem setitem delitem iter reversed contains bool int float complex index array repr format
    neg pos abs invert add sub mul truediv floordiv mod pow matmul and or xor lshift rshift
    eq ne lt le gt ge radd rsub rmul rtruediv rfloordiv rmod rpow rmatmul rand ror rxor rlshift
    rrshift iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift
"""
for _name in _OPERATORS.split():
    setattr(Unfinished, f"__{_name}__", _operator(f"__{_name}__"))
Unfinished.__hash__ = object.__hash__


def finished(value: Any) -> Any:
    """``value`` with tensors for what is unfinished in it, in lists, dictionaries and so on too."""
    if all(type(leaf) is not Unfinished for leaf in tree_leaves(value)):
        return value
    return tree_map_only(Unfinished, Unfinished.tensor, value)


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
