"""Which encoders shrink images of different sizes one by one? A packed stencil does all at once."""

from collections.abc import Callable
from itertools import groupby

import torch
from torch import nn

from .. import functional
from ..functional.inputs import ordinary
from ..host.private import children_of
from ..stencil import Stencil
from .swap import (
    Found,
    Kind,
    as_fused,
    disagreement,
    note,
    parameter_names,
    random_tokens,
    stand_in,
    state,
)

_LAYERS = ("embeddings", "encoder", "post_layernorm")
_TRIAL_GRIDS, _TRIAL_MERGES = [[1, 4, 6], [3, 2, 4], [2, 3, 6], [1, 4, 8]], [2, 1, 3, 4]


def downsampling(grids: torch.Tensor, merges: torch.Tensor) -> Stencil | None:
    """That of images [t, h, w], each by its own factor, whose tokens go block by block.

    Bilinear downsampling by m looks at the middle of every m x m block, whose tokens are neighbours
    in the sequence: whatever the sizes of the images, it is that of a few runs of blocks. None if
    the arguments are not that.
    """
    if not isinstance(grids, torch.Tensor) or not isinstance(merges, torch.Tensor):
        return None
    if torch.compiler.is_compiling():  # a packed stencil is built outside of a graph
        return None
    sizes, factors = grids.tolist(), merges.tolist()
    if not sizes or len(sizes) != len(factors):
        return None
    for (t, h, w), m in zip(sizes, factors, strict=True):
        if min(t, h, w, m) < 1 or h % m or w % m:
            return None
    runs = []
    for m, group in groupby(zip(factors, sizes, strict=True), lambda image: image[0]):
        blocks = sum(t * h * w for _, (t, h, w) in group) // m**2
        runs += [Stencil.bilinear((run, m, m), (run, 1, 1)) for run in _powers(blocks)]
    return Stencil.concat(runs)


def _powers(count: int) -> list[int]:
    """The powers of two that add up to it: of their tables, which are kept, there are few."""
    return [1 << bit for bit in range(count.bit_length()) if count >> bit & 1]


class OfTower(Kind):
    """A vision tower that ends with that downsampling."""

    does = "downsampling of images of all sizes at once"
    how = "downsampling of all images is one pooling"


class Unshuffle(OfTower):
    """VideoLLaMA 3 of transformers, where it is a method: ``pixel_unshuffle``."""

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        method = getattr(type(module), "pixel_unshuffle", None)
        if parameter_names(method) != ["hidden_states", "grid_thw", "merge_sizes"]:
            return None
        if "pixel_unshuffle" in module.__dict__:
            return Found("its pixel_unshuffle is replaced on the instance")
        stock = stand_in(module, children_of(module))
        ours = as_fused(stock, cls, None)
        problem = disagreement(stock.pixel_unshuffle, ours.pixel_unshuffle, *_trial())
        if problem:
            return Found(f"its pixel_unshuffle is not the one known here: {problem}")
        return Found(cls.does, cls)

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        def pixel_unshuffle(self, hidden_states, grid_thw, merge_sizes):
            stencil = downsampling(grid_thw, merge_sizes)
            if hidden_states.dim() != 2 or not ordinary(hidden_states):
                stencil = None
            note(self, "stock" if stencil is None else "fused")
            if stencil is None:
                return original.pixel_unshuffle(self, hidden_states, grid_thw, merge_sizes)
            backend = state(self).backend
            return functional.pool(hidden_states[None], stencil, backend=backend)[0]

        return {"pixel_unshuffle": pixel_unshuffle}


class Encoder(OfTower):
    """VideoLLaMA 3 as it was published, where it ends the tower's ``forward``."""

    @classmethod
    def find(cls, module: nn.Module) -> Found | None:
        if tuple(children_of(module)) != _LAYERS:
            return None
        if parameter_names(type(module).forward) != ["pixel_values", "grid_sizes", "merge_sizes"]:
            return None
        calls, stock = [], stand_in(module, {name: nn.Identity() for name in _LAYERS})
        for name, layer in children_of(stock).items():
            layer.forward = _noting(calls, name)
        ours = as_fused(stock, cls, None)
        forwards = (_noting_start(calls, each.forward) for each in (stock, ours))
        problem = disagreement(*forwards, *_trial())
        if problem is None and any(run != calls[0] for run in calls):
            problem = "it calls its layers in another way"
        if problem:
            return Found(f"its forward is not the one known here: {problem}")
        return Found(cls.does, cls)

    @classmethod
    def methods(cls, original: type[nn.Module]) -> dict[str, Callable]:
        def forward(self, pixel_values, grid_sizes, merge_sizes=None):
            stencil = downsampling(grid_sizes, merge_sizes)
            note(self, "stock" if stencil is None else "fused")
            if stencil is None:
                return original.forward(self, pixel_values, grid_sizes, merge_sizes)
            x = self.encoder(self.embeddings(pixel_values), grid_sizes, merge_sizes)
            x = self.post_layernorm(x)
            return functional.pool(x[None], stencil, backend=state(self).backend)[0]

        return {"forward": forward}


def _noting_start(calls: list[list], forward: Callable) -> Callable:
    def run(*args):
        calls.append([])
        return forward(*args)

    return run


def _noting(calls: list[list], name: str) -> Callable:
    """A forward that returns its first argument, and notes which others it got."""

    def forward(x, *args, **kwargs):
        calls[-1].append((name, *map(id, args), *((k, id(v)) for k, v in kwargs.items())))
        return x

    return forward


def _trial() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = sum(t * h * w for t, h, w in _TRIAL_GRIDS)
    grids = torch.tensor(_TRIAL_GRIDS, device="cpu")
    return random_tokens(tokens, 3), grids, torch.tensor(_TRIAL_MERGES, device="cpu")
