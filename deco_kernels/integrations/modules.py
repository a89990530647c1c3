"""Which modules pool and project by themselves?"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from ..functional import autocast_dtype
from ..functional.inputs import ordinary
from ..host.private import buffers_of, children_of, parameters_of
from ..projector import FusedAvgPoolProjector, changed_sampler, project, unreadable
from ..projector.layers import difference, plain
from ..stencil import Stencil
from ..stencil.numbers import whole_root
from . import tail
from .swap import (
    Found,
    Kind,
    as_fused,
    changed,
    disagreement,
    note,
    parameter_names,
    random_tokens,
    simple_values,
    stand_in,
    state,
)


class PooledProjector(Kind):
    """A projector that pools: nothing more is to be said of its layers."""

    @classmethod
    def owned(cls, module: nn.Module) -> tuple[nn.Module, ...]:
        return tuple(module.modules())


class OfTokens(PooledProjector):
    """A projector that is called with nothing but tokens [B, h * h, K]."""

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        name = next(iter(parameter_names(original.forward)), None)

        def forward(self, *args, **kwargs):
            x = kwargs.get(name) if not args else args[0]
            parts = cls.parts(self)
            if len(args) + len(kwargs) == 1 and not isinstance(parts, str):
                y = cls.fused(self, parts, x)
                if y is not None:
                    note(self, "fused")
                    return y
            note(self, "stock")
            return original.forward(self, *args, **kwargs)

        return {"forward": forward}

    @classmethod
    def fused(cls, module: nn.Module, parts: Any, x: object) -> torch.Tensor | None:
        """The output; None where the original class has to say what is wrong with ``x``."""
        raise NotImplementedError


class PooledBefore(OfTokens):
    """Average pooling, then an MLP: DeCo's own projector, computed as FusedAvgPoolProjector."""

    how = "pools before the first layer"

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        if isinstance(module, FusedAvgPoolProjector):
            return Found("it is a FusedAvgPoolProjector already")
        if not {"sampler", "mlp_projector"} <= children_of(module).keys():
            return None
        try:
            like = FusedAvgPoolProjector.from_reference(module)
        except TypeError as error:
            return Found(str(error))
        problem = _more_than(module, {"sampler", "mlp_projector"})
        if problem is None and like.explain().path != "fused":
            problem = like.explain().reason
        if problem:
            return Found(problem)
        side, mlp = like._side, nn.Sequential(*tail.tiny(module.mlp_projector).values())
        stock = stand_in(module, {"sampler": module.sampler, "mlp_projector": mlp})
        seen = simple_values(module), side
        trials = ((random_tokens(2, n * n, 3),) for n in (side + 1, side + 12))
        problem = _differs(stock, cls, seen, trials)
        what = f"average pooling to {side}x{side}, MLP"
        return Found(problem) if problem else Found(what, cls, seen)

    @classmethod
    def parts(cls, module: nn.Module) -> tuple[nn.Sequential, int] | str:
        """The MLP, and the side of the square that is pooled to."""
        values, side = state(module).seen
        mlp = module.mlp_projector
        problem = changed(module, values) or changed_sampler(module.sampler, side)
        return problem or unreadable(mlp) or (mlp, side)

    @classmethod
    def fused(
        cls, module: nn.Module, parts: tuple[nn.Sequential, int], x: object
    ) -> torch.Tensor | None:
        mlp, side = parts
        grid = _square(x, mlp[0])
        if grid is None:
            return None
        return project(x, mlp, Stencil.adaptive(grid, (side, side)), state(module).backend)


class PooledAfter(PooledProjector):
    """An MLP of two layers, then average pooling: pools in front of the second layer."""

    does: str
    how = "pools before linear_2"

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        found = tail.layers(module)
        if (
            type(module) is nn.Sequential
            or found is None
            or children_of(module).get("pooling") is None
        ):
            return None
        problem = (
            _more_than(module, {*found, "pooling"})
            or _not_average(module.pooling)
            or (None if plain(module.pooling, type(module.pooling)) else "pooling is hooked")
        )
        last = problem or tail.read(module)
        if isinstance(last, str):
            return Found(last)
        kind = next((kind for kind in (ByRatio, OfFrames) if kind.fits(module)), None)
        if kind is None:
            return Found(f"the pooling {type(module.pooling).__name__} is not known here")
        values = simple_values(module), simple_values(module.pooling)
        seen = *values, tail.kinds(module), type(module.pooling)
        pooling = stand_in(module.pooling, {})
        stock = stand_in(module, {**tail.tiny(module), "pooling": pooling})
        problem = _differs(stock, kind, seen, kind.trials(module))
        return Found(problem) if problem else Found(f"{kind.does}, before linear_2", kind, seen)

    @classmethod
    def parts(cls, module: nn.Module) -> tail.Tail | str:
        """The tail of the MLP."""
        values, values_of_pooling, kinds, pooling = state(module).seen
        if not plain(module.pooling, pooling):
            return f"pooling {difference(module.pooling, pooling)}"
        problem = changed(module, values) or changed(module.pooling, values_of_pooling)
        return problem or tail.read(module, kinds)

    @staticmethod
    def fits(module: nn.Module) -> bool:
        """Whether this is the pooling that the kind knows."""
        raise NotImplementedError

    @staticmethod
    def trials(module: nn.Module) -> Iterator[tuple]:
        """Arguments to compare with the module's own forward, with 3 channels."""
        raise NotImplementedError


class ByRatio(PooledAfter, OfTokens):
    """As Perception-LM: a square grid, each side divided by ``pooling.pooling_ratio``."""

    does = "adaptive average pooling by a ratio"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        return isinstance(getattr(module.pooling, "pooling_ratio", None), int)

    @staticmethod
    def trials(module: nn.Module) -> Iterator[tuple]:
        ratio = module.pooling.pooling_ratio
        for side in (2 * ratio, 3 * ratio + 1, 12 * ratio):
            yield (random_tokens(2, side * side, 3),)

    @classmethod
    def fused(cls, module: nn.Module, parts: tail.Tail, x: object) -> torch.Tensor | None:
        grid, ratio = _square(x, parts.before[0]), module.pooling.pooling_ratio
        if grid is None or not 0 < ratio <= grid[0]:
            return None
        stencil = Stencil.adaptive(grid, (grid[0] // ratio, grid[1] // ratio))
        return parts.pooled(parts.hidden(x), stencil, state(module).backend)


class OfFrames(PooledAfter):
    """As PLLaVA: adaptive average pooling of the frames, heights and widths of videos."""

    does = "adaptive average pooling over frames and grid"

    @staticmethod
    def fits(module: nn.Module) -> bool:
        called_with = ["image_features", "media_type", "batch_size", "num_videos"]
        return (
            type(module.pooling) is nn.AdaptiveAvgPool3d
            and parameter_names(type(module).forward) == called_with
            and all(hasattr(module, name) for name in ("frame_shape", "num_frames", "use_pooling"))
        )

    @staticmethod
    def trials(module: nn.Module) -> Iterator[tuple]:
        tokens = math.prod(module.frame_shape)
        yield random_tokens(2 * module.num_frames, tokens, 3), "video", 1, 2
        yield random_tokens(1, tokens, 3), "image", 1, 1
        if module.use_pooling and module.num_frames > 1:
            yield random_tokens(module.num_frames - 1, tokens, 3), "video", 1, 1

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        def forward(self, image_features, media_type, batch_size=None, num_videos=None):
            last = cls.parts(self)
            layout = None
            if not isinstance(last, str):
                layout = cls.layout(self, image_features, media_type, batch_size, num_videos)
            note(self, "stock" if layout is None else "fused")
            if layout is None:
                return original.forward(self, image_features, media_type, batch_size, num_videos)
            # Frames are repeated behind the first layer: it need not see one of them twice.
            z, (total, videos, stencil) = last.hidden(image_features), layout
            if media_type == "image":
                z = z.repeat(self.num_frames, 1, 1)
            elif total > z.shape[0]:
                z = z.repeat_interleave(self.num_frames // z.shape[0] + 1, dim=0)[:total]
            z = z.reshape(videos, -1, z.shape[-1])
            return last.pooled(z, stencil, state(self).backend)

        return {"forward": forward}

    @staticmethod
    def layout(
        module: nn.Module, x: torch.Tensor, media_type: str, batch_size: int, num_videos: int
    ) -> tuple[int, int, Stencil] | None:
        """Frames, videos and pooling of x [frames, h * w, K].

        None where the original class has to say what is wrong.
        """
        if not isinstance(x, torch.Tensor) or not ordinary(x) or x.dim() != 3:
            return None
        if media_type not in ("video", "image"):
            return None
        if type(batch_size) is not int or type(num_videos) is not int:
            return None
        (h, w), total, videos = module.frame_shape, x.shape[0], batch_size * num_videos
        if media_type == "image":
            total *= module.num_frames
        elif 0 < total < module.num_frames and module.use_pooling:
            total = module.num_frames
        if videos < 1 or not total or total % module.num_frames or total % videos:
            return None
        if h * w != x.shape[1]:
            return None
        grid = (total // videos, h, w)
        size = module.pooling.output_size
        size = (size,) * 3 if isinstance(size, int) else size
        target = tuple(n if s is None else s for n, s in zip(grid, size, strict=True))
        return total, videos, Stencil.adaptive(grid, target)


def _square(x: object, first: nn.Linear) -> tuple[int, int] | None:
    """The grid of tokens x [B, h * h, K] as the layer ``first`` takes them; None if x is not that.

    A layer's own dtype or autocast: the original code may cast whatever else comes.
    """
    weight = parameters_of(first)["weight"]
    if not isinstance(x, torch.Tensor) or x.dim() != 3 or x.shape[2] != weight.shape[1]:
        return None
    if not ordinary(x):
        return None
    if x.device != weight.device or (x.dtype != weight.dtype and autocast_dtype(x) is None):
        return None
    side = whole_root(x.shape[1])
    return (side, side) if side and side * side == x.shape[1] else None


def _more_than(module: nn.Module, children: set[str]) -> str | None:
    """What a module has that its fused form would not compute."""
    more = children_of(module).keys() - children
    if more:
        return f"it has more layers than expected: {', '.join(sorted(more))}"
    if any(p is not None for p in (*parameters_of(module).values(), *buffers_of(module).values())):
        return "it has parameters or buffers of its own"
    return None


def _not_average(pooling: nn.Module) -> str | None:
    name = type(pooling).__name__
    if type(pooling) is nn.Identity:
        return "it pools nothing"
    if "max" in name.lower():
        return f"max pooling ({name}) does not commute with a linear layer"
    if [*pooling.parameters(), *pooling.children()]:
        return f"pooling ({name}) has weights: it is no average of tokens"
    return None


def _differs(
    stock: nn.Module, kind: type[Kind], seen: object, trials: Iterable[tuple]
) -> str | None:
    """How the class's own forward differs from ours; tried out with few channels."""
    ours = as_fused(stock, kind, seen)
    for arguments in trials:
        for training in (True, False):
            stock.__dict__["training"] = ours.__dict__["training"] = training
            problem = disagreement(stock.forward, ours.forward, *arguments)
            if problem:
                return f"its forward is not the one known here: {problem}"
    return None
