"""Which models pool what a projector returned? There the pooling is a method of the model."""

import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import nn

from .. import functional
from ..host import private
from ..projector.layers import difference, plain
from ..stencil import Stencil
from . import tail
from .swap import (
    Found,
    Kind,
    changed,
    disagreement,
    note,
    random_tokens,
    simple_values,
    stand_in,
    state,
)
from .unfinished import finished
from .view import Projector, View


class PooledByModel(Kind):
    """A model that calls a projector and then a pooling method of its own.

    ``projector``, ``pool`` and ``entries`` are the names of the projector, the pooling method and
    the methods that call both.
    """

    projector = "mm_projector"
    through_get_model = True
    how = "pools before the last layer of the projector (inside torch.compile: the stock code)"
    pool: str
    entries: tuple[str, ...]

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        return {name: cls._entry(original, name) for name in cls.entries if hasattr(original, name)}

    @classmethod
    def _entry(cls, original: type[nn.Module], name: str) -> Callable:
        def entry(self, *args, **kwargs):
            stock = getattr(original, name)
            last = cls.parts(self)
            note(self, "stock")  # before it has pooled
            if isinstance(last, str) or torch.compiler.is_compiling():  # Dynamo knows no views
                return stock(self, *args, **kwargs)
            projector = Projector(cls.module(self), last, state(self).backend)
            attribute = None if cls.through_get_model else cls.projector
            view = View.of(self, original, projector, attribute, cls.pool, cls)
            return finished(stock(view, *args, **kwargs))

        return entry

    @classmethod
    def module(cls, model: nn.Module) -> nn.Module | None:
        """The model's projector."""
        owner = model.get_model() if cls.through_get_model else model
        return private.children_of(owner).get(cls.projector)

    @classmethod
    def parts(cls, model: nn.Module) -> tail.Tail | str:
        """The tail of the projector, or why its weights must not be read."""
        problem = private.lacks("later pooling")
        if problem:
            return problem
        module, (values, kind, kinds, mode) = cls.module(model), state(model).seen
        if not plain(module, kind):
            return f"{cls.projector} {difference(module, kind)}"
        problem = changed(module, values)
        if problem:
            return f"{cls.projector}'s {problem}"
        if cls.mode(model) != mode:
            return f"the model pools by {cls.mode(model)!r} now"
        return tail.read(module, kinds)

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        # Of the class: wrappers such as PEFT's answer for the model that they wrap.
        if not all(callable(getattr(type(module), name, None)) for name in cls.needs()):
            return None
        projector = cls.module(module)
        if not isinstance(projector, nn.Module):
            return None
        owned = (projector,)
        problem = cls._problem(module, projector)
        if problem:
            return Found(problem, owned=owned)
        values, kinds = simple_values(projector), tail.kinds(projector)
        seen = values, type(projector), kinds, cls.mode(module)
        return Found(f"{cls.pool}, in front of the last layer of {cls.projector}", cls, seen, owned)

    @classmethod
    def needs(cls) -> tuple[str, ...]:
        return (cls.pool, "get_model") if cls.through_get_model else (cls.pool,)

    @classmethod
    def _problem(cls, model: nn.Module, projector: nn.Module) -> str | None:
        if "max" in str(cls.mode(model)):
            return f"{cls.pool} pools by maximum, which does not commute with a linear layer"
        if tail.layers(projector) is None:
            return f"{cls.projector} ({type(projector).__name__}) is not known here"
        if not plain(projector, type(projector)):
            return f"{cls.projector} is hooked"
        last = tail.read(projector)
        if isinstance(last, str):
            return f"{cls.projector}: {last}"
        if type(projector) not in (nn.Linear, nn.Sequential):
            stock = stand_in(projector, tail.tiny(projector))
            small = tail.read(stock)
            problem = disagreement(
                stock.forward, lambda x: small.whole(small.hidden(x)), random_tokens(2, 6, 3)
            )
            if problem:
                return f"{cls.projector}'s forward is not the one known here: {problem}"
        return cls._pool_problem(model)

    @classmethod
    def _pool_problem(cls, model: nn.Module) -> str | None:
        """How the pooling method differs from ours, on tokens of 3 channels."""
        stock, tried = getattr(type(model), cls.pool), stand_in(model, private.children_of(model))
        for name in (cls.pool, *cls.entries):
            if name in model.__dict__:
                return f"{name} is replaced on the instance"
        try:
            for tokens, *arguments in cls.trials(model):
                stencil = cls.stencil(model, stock, tokens, *arguments)
                if stencil is None:
                    return f"{cls.pool} pools by {cls.mode(model)!r}, which is not known here"
                problem = disagreement(
                    lambda x, *a: stock(tried, x, *a),
                    lambda x, *_, s=stencil: functional.pool(x, s, backend="eager"),
                    random_tokens(2, tokens, 3),
                    *arguments,
                )
                if problem:
                    return f"{cls.pool} is not the one known here: {problem}"
        except Exception as error:  # a tower that is not loaded, for one
            return f"{cls.pool} is not the one known here: {type(error).__name__}: {error}"
        return None

    @staticmethod
    def mode(model: nn.Module) -> str | None:
        """How the configuration says to pool; must stay what it is."""
        return None

    @staticmethod
    def trials(model: nn.Module) -> Iterator[tuple]:
        """Token counts and further arguments to compare the pooling method with."""
        raise NotImplementedError

    @staticmethod
    def stencil(
        model: nn.Module, stock: Callable, tokens: int, *args: object, **kwargs: object
    ) -> Stencil | None:
        """The pooling of ``tokens`` by the method ``stock``; None if that must be called itself."""
        raise NotImplementedError

    @classmethod
    def owned(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        return (cls.module(module),)


class Llava(PooledByModel):
    """LLaVA-NeXT, LLaVA-Video and their like: ``get_2dPool(features, stride)``."""

    pool = "get_2dPool"
    entries = ("prepare_inputs_labels_for_multimodal", "encode_multimodals")

    @staticmethod
    def mode(model: nn.Module) -> str | None:
        return getattr(getattr(model, "config", None), "mm_spatial_pool_mode", None)

    @staticmethod
    def trials(model: nn.Module) -> Iterator[tuple]:
        tokens = model.get_vision_tower().num_patches_per_side ** 2
        yield tokens, 2
        yield tokens, 3
        yield (tokens,)

    @staticmethod
    def stencil(
        model: nn.Module, stock: Callable, tokens: int, *args: object, **kwargs: object
    ) -> Stencil | None:
        given = inspect.signature(stock).bind(model, None, *args, **kwargs)
        given.apply_defaults()
        stride, side = given.arguments.get("stride"), model.get_vision_tower().num_patches_per_side
        if type(stride) is not int or not 0 < stride <= side or side * side != tokens:
            return None
        mode = Llava.mode(model)
        if mode == "average":
            return Stencil.fixed((side, side), stride, stride)
        if mode == "bilinear":
            return Stencil.bilinear((side, side), (math.ceil(side / stride),) * 2)
        return None


class Matryoshka(PooledByModel):
    """Matryoshka multimodal models: average pooling to a number of tokens chosen in every call."""

    pool = "matryoshka_vis_token_process"
    entries = ("prepare_inputs_labels_for_multimodal",)

    @staticmethod
    def trials(model: nn.Module) -> Iterator[tuple]:
        for scale in (36, 9, 4, 1):
            yield 36, scale

    @staticmethod
    def stencil(
        model: nn.Module, stock: Callable, tokens: int, *args: object, **kwargs: object
    ) -> Stencil | None:
        scale, side = (*args, *kwargs.values()), math.isqrt(tokens)
        if side * side != tokens or list(map(type, scale)) != [int] or not 0 < scale[0] <= tokens:
            return None
        window = int(math.sqrt(tokens / scale[0]))
        return Stencil.fixed((side, side), window, window)


class Onevision(PooledByModel):
    """LLaVA-OneVision of transformers: bilinear ``apply_pooling`` of a video's frames."""

    projector = "multi_modal_projector"
    through_get_model = False
    pool = "apply_pooling"
    entries = ("get_video_features",)

    @staticmethod
    def _side(model: nn.Module) -> int:
        vision = model.config.vision_config
        return vision.image_size // vision.patch_size

    @staticmethod
    def trials(model: nn.Module) -> Iterator[tuple]:
        yield (Onevision._side(model) ** 2,)

    @staticmethod
    def stencil(
        model: nn.Module, stock: Callable, tokens: int, *args: object, **kwargs: object
    ) -> Stencil | None:
        side = Onevision._side(model)
        if args or kwargs or side * side != tokens:
            return None
        return Stencil.bilinear((side, side), (math.ceil(side / 2),) * 2)
