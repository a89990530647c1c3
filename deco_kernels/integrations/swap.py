"""How does a module become another one in place? It gets a subclass of its own class, and back."""

import copy
import copyreg
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends import choose
from ..host import private
from ..projector import Plan

ATTRIBUTE = "_deco_kernels"  # of a fused module: its State
_SIMPLE = (int, float, bool, str, type(None))
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


@dataclass
class State:
    """What a fused module remembers.

    The backend, what ``fuse`` saw that must not change, and the path of the last call.
    """

    backend: str
    seen: Any
    last: str | None = None


class Found(NamedTuple):
    """What is known about a module: how it is fused, or why it is left alone.

    ``owned`` are modules that are a part of it, of which nothing more is to be said.
    """

    what: str
    kind: "type[Kind] | None" = None
    seen: Any = None
    owned: tuple[nn.Module, ...] = ()


class Kind:
    """How modules of one kind are known and fused. Not itself in their classes.

    For code asks modules for names such as ``module``: they get no method that they did not have.
    """

    how: str  # it computes, in words

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        """What ``module`` is; None if it is nothing of this kind."""
        raise NotImplementedError

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        """The fused methods, which fall back on those of the original class."""
        raise NotImplementedError

    @classmethod
    def parts(cls, module: nn.Module) -> Any:
        """What the fused methods compute with, or a str: why they must not."""
        return None

    @classmethod
    def plan(cls, module: nn.Module) -> Plan:
        """Which way the next call of a fused module takes."""
        parts, remembered = cls.parts(module), state(module)
        if isinstance(parts, str):
            return Plan("eager", "stock", private.noted(parts), remembered.last)
        parameters = (p for m in (*cls.owned(module), module) for p in m.parameters())
        like = next(parameters, torch.empty(0))
        backend = choose(remembered.backend, like.device, like.dtype).backend
        return Plan(backend, "fused", private.noted(cls.how), remembered.last)

    @classmethod
    def owned(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        """Modules in a fused one of which nothing more is to be said."""
        return ()


class Swapped:
    """In front of a module's own class.

    Only the class of the object changes. So parameters, buffers, hooks, state-dict keys and
    references to it stay what they are.
    """

    def __repr__(self) -> str:
        return f"Fused{super().__repr__()}"

    def __reduce_ex__(self, protocol: int) -> tuple:
        # The class was made at run time: a copy makes it again from the original one.
        function, arguments, *rest = super().__reduce_ex__(max(protocol, 2))
        if function is copyreg.__newobj__ and "deco_kind" in arguments[0].__dict__:
            made, *more = arguments
            return _again, (made.deco_kind, made.deco_original, *more), *rest
        return function, arguments, *rest


def _again(kind: type[Kind], original: type[nn.Module], *arguments: object) -> nn.Module:
    made = fused_class(kind, original)
    return made.__new__(made, *arguments)


@cache
def fused_class(kind: type[Kind], original: type[nn.Module]) -> type[nn.Module]:
    """The one subclass of ``original`` with the methods of ``kind``."""
    body = {"deco_kind": kind, "deco_original": original, "__doc__": original.__doc__}
    for name, method in kind.methods(original).items():
        body[name] = wraps(getattr(original, name))(method)

    @wraps(original.__init__)
    def __init__(self, *args, **kwargs):
        original.__init__(self, *args, **kwargs)
        if type(self) is made:  # by type(model)(config), as copies of averaged weights are
            self.__class__ = original

    made = subclass(original, Swapped, body | {"__init__": __init__})
    return made


def subclass(original: type, mixin: type, body: dict[str, Any]) -> type:
    """A subclass under the original's name: configurations and wrapping policies write it down."""
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original)(original.__name__, (mixin, original), names | body)


def kind_of(module: nn.Module) -> type[Kind] | None:
    """The kind of a fused module; None if it is not fused."""
    return getattr(type(module), "deco_kind", None)


def state(module: nn.Module) -> State:
    return module.__dict__[ATTRIBUTE]


def note(module: nn.Module, path: str) -> None:
    """Remember which way this call went; a graph of torch.compile has no memory."""
    if not torch.compiler.is_compiling():
        state(module).last = path


def swap(module: nn.Module, found: Found, backend: str) -> None:
    module.__class__ = fused_class(found.kind, type(module))
    module.__dict__[ATTRIBUTE] = State(backend, found.seen)


def swap_back(module: nn.Module) -> str | None:
    """Undo :func:`swap`; the reason if that is not possible."""
    if "deco_original" not in type(module).__dict__:
        return f"its class was changed again, to {type(module).__name__}: undo that first"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance: undo that first"
    module.__class__ = type(module).deco_original
    del module.__dict__[ATTRIBUTE]
    return None


def stand_in(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """An object of ``module``'s class with other children and no hooks, to be tried out."""
    made = object.__new__(type(module))
    for key, value in module.__dict__.items():
        if type(value) in (dict, list, set, OrderedDict):  # a trial may store something
            value = type(value)() if "_hooks" in key else copy.copy(value)
        made.__dict__[key] = value
    buffers = private.buffers_of(module).items()
    private.rebuild(made, children, {k: None if b is None else b.clone() for k, b in buffers})
    return made


def as_fused(stood: nn.Module, kind: type[Kind], seen: Any) -> nn.Module:
    """The same stand-in, fused."""
    made = stand_in(stood, private.children_of(stood))
    swap(made, Found("", kind, seen), "eager")
    return made


def disagreement(
    stock: Callable[..., object],
    ours: Callable[..., object],
    tokens: torch.Tensor,
    *arguments: object,
) -> str | None:
    """How two functions differ on the same tokens, float64 on the CPU; None if they agree.

    Also on huge tokens and on a NaN, which show whether the stock one clamps or cleans.
    """
    broken = tokens.clone()
    broken[(0,) * (tokens.dim() - 1)] = torch.nan
    problems = (_disagreement(stock, ours, x, *arguments) for x in (tokens, 1e6 * tokens, broken))
    return next(filter(None, problems), None)


def _disagreement(
    stock: Callable[..., object], ours: Callable[..., object], *arguments: object
) -> str | None:
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            want, got = stock(*arguments), ours(*arguments)
        except Exception as error:
            return f"it raised {type(error).__name__}: {error}"
    if not isinstance(want, torch.Tensor) or want.shape != got.shape:
        return "it returned another shape"
    if want.dtype != got.dtype:
        return f"it returned {want.dtype} for {got.dtype}"
    same = torch.allclose(got, want, rtol=1e-9, atol=1e-9, equal_nan=True)
    return None if same else "it computes something else"


def simple_values(module: nn.Module) -> dict[str, Any]:
    """The numbers, strings and so on that a module's own code may read from it."""
    classes = reversed(type(module).__mro__)
    found = {k: v for c in classes if not issubclass(nn.Module, c) for k, v in vars(c).items()}
    return {
        name: value
        for name, value in (found | module.__dict__).items()
        if type(value) in _SIMPLE and name not in _OF_EVERY_MODULE and name[:2] != "__"
    }


def changed(module: nn.Module, values: dict[str, Any]) -> str | None:
    """Which of its :func:`simple_values` is another one now; None if none is."""
    for name, value in values.items():
        now = getattr(module, name, None)
        if type(now) is not type(value) or now != value:
            return f"{name} is {now!r} now"
    return None


def parameter_names(method: object) -> list[str] | None:
    """Those of a method, but for ``self``; None if it is none."""
    return list(inspect.signature(method).parameters)[1:] if callable(method) else None


def random_tokens(*shape: int) -> torch.Tensor:
    """Float64 on the CPU, whatever the default is; leaves the global generator alone."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
