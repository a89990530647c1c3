"""What is a projector's output before it is computed? A tensor whose data come at need."""

import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..host import private
from ..host.private import tree_leaves, tree_map, tree_map_only
from ..stencil import Stencil
from .tail import Tail


class Modes(NamedTuple):
    """Those in which a projector was called, to compute in later."""

    grad: bool
    inference: bool
    autocast: torch.dtype | None = None  # of the linear layer

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        autocast = nullcontext()
        if torch.amp.is_autocast_available(device.type):
            autocast = torch.autocast(device.type, self.autocast, self.autocast is not None)
        # inference_mode(False) has autograd record in __torch_dispatch__ too.
        with torch.inference_mode(self.inference), torch.set_grad_enabled(self.grad), autocast:
            yield

    def here(self) -> "Modes":
        """Without gradients where there are none now."""
        return self._replace(grad=self.grad and torch.is_grad_enabled())


class Unfinished(torch.Tensor):
    """A projector's output [B, n, N], not computed before somebody wants more than to pool it.

    Shape, dtype, device and history are there from the beginning: C++ may take it for the tensor
    that it is. Python's functions get ``tensor()``, and so do operators that C++ calls.
    """

    __slots__ = ("_aliases", "_backend", "_modes", "_node", "_seen", "_tail", "_y", "_z")

    @staticmethod
    def of(last: Tail, z: torch.Tensor, backend: str, modes: Modes) -> "Unfinished":
        parameters = private.parameters_of(last.linear)
        with modes.on(z.device):
            made = _Output.apply(last, modes, z, parameters["weight"], parameters["bias"])
        made._tail, made._z, made._backend, made._modes = last, z, backend, modes
        made._y, made._seen, made._node = None, _state(z), made._history()
        made._aliases = []
        return made

    def _history(self) -> Any:
        with private.as_base_tensor():
            return self.grad_fn

    def lazy(self) -> bool:
        """Whether pooling may still go in front of the last layer."""
        return self._y is None and self._history() is self._node

    def tensor(self) -> torch.Tensor:
        """The output, computed once. What is done to one is seen in the other, in gradients too.

        Raises:
            RuntimeError: something was changed in place that it was to be computed from, or that
                would share its memory.
        """
        self._check()
        if self._y is None:
            with self._modes.on(self._z.device), _no_checkpoint():
                self._y = self._tail.whole(self._z)
            self._seen = ()
        self._follow()
        self._y.__dict__.update(self.__dict__)
        return self._y

    def pooled(self, stencil: Stencil) -> torch.Tensor | None:
        """Pooled in front of the last layer; None if the output is already there."""
        if not self.lazy():
            return None
        self._check()
        modes = self._modes.here()._replace(inference=torch.is_inference_mode_enabled())
        with modes.on(self._z.device):
            return self._tail.pooled(self._z, stencil, self._backend)

    def _parts(self, cut: Callable[[torch.Tensor], Any]) -> Any:
        """What cuts the output along its first axis, done to the pre-activation."""
        self._check()
        modes = self._modes.here()
        with modes.on(self._z.device):
            cuts = cut(self._z)
        parts = tree_map(lambda z: Unfinished.of(self._tail, z, self._backend, modes), cuts)
        family = [self, *self._others()]
        for part in tree_leaves(parts):
            part._aliases += map(weakref.ref, family)
            for member in family:
                member._aliases.append(weakref.ref(part))
        return parts

    def _others(self) -> "list[Unfinished]":
        """Those that would share its memory had they been computed first and cut then."""
        return [other for alias in self._aliases if (other := alias()) is not None]

    def _check_alone(self) -> None:
        if self._others():
            raise RuntimeError(
                "a part of a projector's output, or one that has parts, was to be changed in "
                "place, and the parts are computed one by one: clone() it before"
            )

    def _check(self) -> None:
        for other in self._others():
            if other._y is not None and other._seen != _state(other._y):
                other._check_alone()
        if self._y is None and self._seen != _state(self._z):
            raise RuntimeError(
                "the projector's input was changed in place before its output was computed: "
                "clone() it before"
            )

    def _follow(self) -> None:
        with Modes(True, False).on(self._y.device), private.as_base_tensor():
            if self.grad_fn is not self._node:  # a Function returned it: as checkpoint does
                self._y = _Data.apply(self)
            elif self._seen != _state(self._y):
                first = self._seen == ()
                if not first:
                    self._check_alone()
                if self._node is not None or self._y.requires_grad:
                    # Computing it changes nothing for who has saved it for backward.
                    with private.keep_version(self) if first else nullcontext():
                        _Follow.apply(self, self._y)
            self._seen, self._node = _state(self._y), self.grad_fn

    @classmethod
    @private.uncompiled  # a compiled function gets the tensor too
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        first = args[0] if args else None
        if type(first) is Unfinished and first.lazy():
            if function in _KNOWN:
                with private.as_base_tensor():
                    return function(*args, **kwargs)
            if _cuts_first_axis(function, args, kwargs):
                return first._parts(lambda z: function(z, *args[1:], **kwargs))
        written = [kwargs.get("out")]
        if _IN_PLACE.fullmatch(getattr(function, "__name__", "")):
            written.append(args[:1])
        for unfinished in _unfinished(written):
            unfinished._check_alone()
        result = function(*finished(args), **finished(kwargs))
        for unfinished in _unfinished((args, kwargs)):
            unfinished._follow()
            if result is unfinished._y:
                return unfinished
        return result

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        def data(unfinished):
            if private.writes(function):
                unfinished._check_alone()
            return unfinished.tensor().detach()

        args, kwargs = tree_map_only(cls, data, (args, kwargs or {}))
        return function(*args, **kwargs)


# What is known of an output that is not computed.
_KNOWN = {
    torch.Tensor.shape.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.device.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.layout.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.is_leaf.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.is_cpu.__get__,
    torch.Tensor.__len__,
    torch.Tensor.dim,
    torch.Tensor.ndimension,
    torch.Tensor.size,
    torch.Tensor.numel,
    torch.Tensor.nelement,
    torch.Tensor.get_device,
    torch.Tensor.is_floating_point,
    torch.numel,
    torch.is_floating_point,
}
_IN_PLACE = re.compile(
    r"(?!__)\w+(?<!_)_|__(set|setitem|i(add|sub|mul|truediv|floordiv|mod|pow|and|or|xor|.shift))__"
)


def _cuts_first_axis(function: Callable, args: tuple, kwargs: dict[str, Any]) -> bool:
    if function is torch.Tensor.__getitem__:
        return type(args[1]) is slice
    cuts = torch.split, torch.Tensor.split, torch.chunk, torch.Tensor.chunk
    return function in cuts and kwargs.get("dim", args[2] if len(args) > 2 else 0) in (0, -3)


def _state(tensor: torch.Tensor) -> tuple[int, bool] | None:
    """What changes when a tensor is changed in place; None where nothing tells."""
    return None if tensor.is_inference() else (private.version_of(tensor), tensor.requires_grad)


def _unfinished(value: Any) -> list[Unfinished]:
    return [leaf for leaf in tree_leaves(value) if type(leaf) is Unfinished]


def finished(value: Any) -> Any:
    """``value`` with tensors for what is unfinished in it, in lists, dicts and their like too."""
    return tree_map(
        lambda leaf: leaf.tensor() if type(leaf) is Unfinished else leaf,
        value,
        is_leaf=lambda tree: not _unfinished(tree),  # stays the same object
    )


def _no_checkpoint() -> AbstractContextManager:
    """A checkpoint must not count what is saved here: it does not come here again."""
    if private.saved_tensors_are_hooked():
        return torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)
    return nullcontext()


class _Output(torch.autograd.Function):
    """Makes an unfinished output. Backward is for what passes by ``tensor()``, and recomputes."""

    @staticmethod
    def forward(ctx, last, modes, z, weight, bias):
        ctx.save_for_backward(z, weight, bias)
        ctx.act, ctx.modes = last.act, modes
        return private.empty_wrapper(
            Unfinished,
            (*z.shape[:-1], len(weight)),
            dtype=modes.autocast or z.dtype,
            device=z.device,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        inputs = [
            None if t is None else t.detach().requires_grad_(needed)
            for t, needed in zip(ctx.saved_tensors, ctx.needs_input_grad[2:], strict=True)
        ]
        z, weight, bias = inputs
        with ctx.modes.on(z.device):
            y = F.linear(z if ctx.act is None else ctx.act(z), weight, bias)
        needed = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(y, needed, dy))
        return None, None, *(next(found) if n else None for n in ctx.needs_input_grad[2:])


class _Data(torch.autograd.Function):
    """The tensor of an unfinished output, with the output's own history."""

    @staticmethod
    def forward(ctx, unfinished):
        return unfinished._y.data

    @staticmethod
    def backward(ctx, dy):
        return dy


class _Follow(torch.autograd.Function):
    """Gives an unfinished output the history of its tensor."""

    @staticmethod
    def forward(ctx, unfinished, tensor):
        ctx.mark_dirty(unfinished)
        return unfinished

    @staticmethod
    def backward(ctx, dy):
        return None, dy
