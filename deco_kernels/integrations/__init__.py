"""How do I swap it in? ``fuse`` walks a model and replaces, in place, what it knows."""

import re
from typing import NamedTuple

import torch
from torch import nn

from ..backends import check_backend
from ..host.private import foreign_global_hook
from ..projector import FusedAvgPoolProjector, Plan
from . import methods as models
from . import modules as projectors
from . import packed
from .swap import Found, as_fused, kind_of, swap, swap_back

__all__ = ["Fusion", "explain", "fuse", "unfuse"]

PROJECTORS = (projectors.PooledBefore, projectors.PooledAfter)
MODELS = (models.Llava, models.Matryoshka, models.Onevision, packed.Unshuffle, packed.Encoder)

# Classes that nothing is known about, but of which a reader of the report would like to hear.
_ATTENTION = re.compile(r"resampler|q_?former|abstractor|perceiver|attention_?pool", re.IGNORECASE)
_OTHER = re.compile(r"projector|connector|pooler$|merger", re.IGNORECASE)


class Fusion(NamedTuple):
    """What was done to a model, by the names of its modules; "" is the model itself.

    Attributes:
        replaced: what of a module is fused now, or for ``unfuse`` the class that it has again.
        left: why a module that looks like a projector was left alone.
    """

    replaced: dict[str, str]
    left: dict[str, str]

    def __str__(self) -> str:
        lines = []
        for title, modules in zip(self._fields, self, strict=True):
            lines += [f"{title}:{'' if modules else ' nothing'}"]
            lines += [f"  {name or '(the model itself)'}: {why}" for name, why in modules.items()]
        return "\n".join(lines)


def fuse(model: nn.Module, *, backend: str = "auto") -> Fusion:
    """Replace, in place, the pooled projectors in a model by fused ones.

    A module gets a subclass of its own class, nothing else: it keeps its parameters, buffers,
    hooks, state-dict keys and identity, and :func:`unfuse` gives it back its class. What is known:

    - pooling, then an MLP (DeCo), as in :class:`FusedAvgPoolProjector`;
    - an MLP, then average pooling (Perception-LM, PLLaVA; LLaVA-NeXT, LLaVA-OneVision and
      Matryoshka models, where the pooling is a method of the model): the pooling goes in front of
      the MLP's last layer, which is the same function, since an average commutes with it;
    - downsampling of packed images (VideoLLaMA 3): one pooling instead of a loop.

    A module is recognised by its structure, and only if its own code computes the same on small
    random float64 tokens; so ``fuse`` runs that code, with stand-ins for layers. In every call in
    which a layer is no longer what ``fuse`` saw (wrapped by LoRA, hooked, partitioned), the
    original code runs; :func:`explain` says so. Fuse before the model is wrapped or compiled.

    Args:
        model: any module.
        backend: of all that is replaced, as in :class:`FusedAvgPoolProjector`.

    Returns:
        What was replaced, and what was left alone and why; ``print`` it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no such backend.
    """
    _check_module(model)
    check_backend(backend)
    done, told, todo = Fusion({}, {}), set(), []
    for name, module in list(model.named_modules()):
        if id(module) in told or isinstance(module, torch.jit.ScriptModule):
            continue
        found = _find(module)
        if found is None:
            continue
        told.update(map(id, found.owned))
        if found.kind is None:
            done.left[name] = found.what
        else:
            todo.append((module, found))
            done.replaced[name] = found.what
    for module, found in todo:  # nothing is changed before all is known
        swap(module, found, backend)
    return done


def unfuse(model: nn.Module) -> Fusion:
    """Undo :func:`fuse`: every module in ``model`` that it replaced has its own class again.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    done = Fusion({}, {})
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None:
            problem = swap_back(module)
            if problem is None:
                done.replaced[name] = type(module).__name__
            else:
                done.left[name] = problem
    return done


def explain(model: nn.Module) -> dict[str, Plan]:
    """Which way everything that :func:`fuse` replaced takes with its layers as they are, and why.

    And so of every :class:`FusedAvgPoolProjector`. The path is "fused", "stock" (the module's
    original code), another of :class:`Plan`, or "refused" where a call would be an error. Weights
    that are gathered for a call only, as by FSDP2 around a module, are "partitioned" before it,
    though the call is fused; ``last`` says what the last call did.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module(model)
    found = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is None and not isinstance(module, FusedAvgPoolProjector):
            continue
        try:
            found[name] = module.explain() if kind is None else kind.plan(module)
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = Plan("none", "refused", str(error))
    return found


def _find(module: nn.Module) -> Found | None:
    kind = kind_of(module)
    if kind is not None:
        return Found("it is fused already", owned=kind.owned(module))
    for kind in (*PROJECTORS, *MODELS):
        try:
            found = kind.find(module)
            if found is not None and found.kind is not None:
                as_fused(module, found.kind, found.seen)  # its class may forbid it
        except Exception as error:
            found = Found(f"it cannot be tried out: {type(error).__name__}: {error}")
        if found is None:
            continue
        problem = foreign_global_hook()
        if "forward" in module.__dict__:
            problem = "its forward is replaced on the instance"
        if problem:
            found = found._replace(what=problem, kind=None)
        return found._replace(owned=tuple(module.modules())) if kind in PROJECTORS else found
    name = type(module).__name__
    if _ATTENTION.search(name):
        what = "pooling by attention is no average: it does not commute with a linear layer"
    elif _OTHER.search(name):
        what = "it is not built like a pooled projector known here"
    else:
        return None
    return Found(what, owned=tuple(module.modules()))


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
