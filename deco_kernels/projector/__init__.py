"""What do I put in my model? The drop-in module."""

from typing import NamedTuple

import torch
from torch import nn

from .. import functional
from ..backends import Choice, check_backend, choose, fastest, preferred
from ..functional.inputs import check_tokens, ordinary
from ..host.private import children_of, foreign_global_hook, noted, parameters_of
from ..reference import AvgPoolProjector
from ..stencil import Stencil
from ..stencil.numbers import check_count, check_grid, square_side
from ..tuning.call import Call
from .layers import materialised, plain


class Plan(NamedTuple):
    """Which way a call takes.

    ``path`` is "fused" (pool and all linear layers in the package's own operators), "pooled" (the
    package's pool, then ``mlp_projector`` is called as a module), "modules" (everything is called
    as a module, like the reference), "stock" (the own code of a module that ``fuse`` replaced) or
    "refused" (the call is an error). ``last`` is the path of the last call; None before the first.
    Calls inside of a graph of torch.compile are not seen.
    """

    backend: str
    path: str
    reason: str
    last: str | None = None

    def __str__(self) -> str:
        last = f" (last call: {self.last})" if self.last else ""
        return f"backend {self.backend}, path {self.path}: {self.reason}{last}"


class FusedAvgPoolProjector(AvgPoolProjector):
    """Drop-in for :class:`AvgPoolProjector`: the same function, parameters and state dict.

    Computes pool and first linear layer in one kernel, keeps only pooled tokens and
    pre-activations for backward, and pools backward without atomics. The children stay plain
    modules, so checkpoints, initialisation, weight decay and adapters keep working. Where they
    are no longer what they were made as (wrapped by LoRA, hooked, partitioned), they are called
    instead of having their weights read; :meth:`explain` says so.

    Args:
        layer_num, query_num, mm_hidden_size, llm_hidden_size: as :class:`AvgPoolProjector`.
        backend: "triton" or "cuda" (one launch for pool and first linear layer), "composed" (our
            pool, cuBLAS, one elementwise kernel), "eager" (torch's operators) or "auto": on an
            NVIDIA GPU the fastest, as ``python -m deco_kernels tune`` measured it there, else as
            the cost model predicts; elsewhere "eager".

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1, ``query_num`` is not a square, or no such backend.
    """

    def __init__(
        self,
        layer_num: int = 2,
        query_num: int = 144,
        mm_hidden_size: int = 1024,
        llm_hidden_size: int = 4096,
        *,
        backend: str = "auto",
    ) -> None:
        check_count("layer_num", layer_num)
        side = square_side("query_num", check_count("query_num", query_num))
        check_count("mm_hidden_size", mm_hidden_size)
        check_count("llm_hidden_size", llm_hidden_size)
        check_backend(backend)
        super().__init__(layer_num, query_num, mm_hidden_size, llm_hidden_size)
        self.backend = backend
        self._side, self._last = side, None

    @classmethod
    def from_reference(cls, module: nn.Module, *, backend: str = "auto") -> "FusedAvgPoolProjector":
        """A fused projector that shares ``module``'s children, and so its parameters and mode.

        Args:
            module: an :class:`AvgPoolProjector`, or any module built like it: an
                ``nn.AdaptiveAvgPool2d`` called ``sampler`` to a square, then an ``nn.Sequential``
                of linear layers and activations called ``mlp_projector``.

        Raises:
            TypeError: ``module`` is not built like that.
        """
        sampler, mlp = getattr(module, "sampler", None), getattr(module, "mlp_projector", None)
        side = _square_output(sampler)
        if side is None or not isinstance(mlp, nn.Sequential) or not len(mlp):
            raise TypeError(
                "module must have a sampler (AdaptiveAvgPool2d to a square) and an mlp_projector"
                f" (Sequential of linear layers) like AvgPoolProjector, got {type(module).__name__}"
            )
        for i in (0, -1):
            if not getattr(mlp[i], "in_features", 0):  # a lazy layer has none yet
                raise TypeError(f"mlp_projector[{i}] must be linear, got {type(mlp[i]).__name__}")
        with torch.device("meta"):  # the children made here are replaced below
            fused = cls(
                (len(mlp) + 1) // 2,
                side * side,
                mlp[0].in_features,
                mlp[-1].out_features,
                backend=backend,
            )
        fused.sampler, fused.mlp_projector = sampler, mlp
        fused.training = module.training
        return fused

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}"

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Project patch tokens.

        Args:
            x: [b, n, mm_hidden_size], any strides, of the parameters' dtype (or under autocast).
            grid: (h, w) with h * w = n, where the patches do not form a square.

        Returns:
            [b, query_num, llm_hidden_size].

        Raises:
            TypeError: x is not floating point, or not of the parameters' dtype.
            ValueError: x is not [b, n, mm_hidden_size], or n does not fit the grid.
            RuntimeError: x is on another device, or the backend cannot run here.
        """
        grid = self._check(x, grid)
        path, _ = self._path(x)
        if not torch.compiler.is_compiling():
            self.__dict__["_last"] = path
        if path == "modules":
            self._choice(x)  # also here it is an error if the backend cannot run
            pooled = self.sampler(x.transpose(1, 2).unflatten(2, grid))
            return self.mlp_projector(pooled.flatten(2).transpose(1, 2))
        stencil = Stencil.adaptive_checked(grid, (self._side, self._side))
        if path == "pooled":
            return self.mlp_projector(functional.pool(x, stencil, backend=self.backend))

        return project(x, self.mlp_projector, stencil, self.backend)

    def explain(self, x: torch.Tensor | None = None, grid: tuple[int, int] | None = None) -> Plan:
        """Which backend and path a call takes, and why: for ``x``, or tokens like the weights.

        It looks at the layers as they are now: weights that are gathered for a call only, as by
        FSDP2 around this module, are "partitioned" before it, though the call is fused.
        Where "auto" depends on sizes, it needs ``x``: the backend is that of pool and first linear
        layer, and the reason has those of the other layers' backwards too.

        Raises:
            TypeError, ValueError, RuntimeError: as the call would.
        """
        if x is not None:
            grid = self._check(x, grid)
        plan = self._plan(x)._replace(last=self.__dict__.get("_last"))
        if plan.path == "fused":
            self._check_layers(self._like(x))
        if plan.backend == "auto" and plan.path == "pooled":
            like = self._like(x)
            return plan._replace(backend=preferred(like.device, like.dtype).backend)
        if plan.backend != "auto" or x is None:
            return plan
        stencil = Stencil.adaptive_checked(grid, (self._side, self._side))
        table = stencil.tables(x.device, torch.float32)[0].index.shape
        dtype = functional.autocast_dtype(x) or x.dtype
        shapes = [linear.weight.shape for linear in self.mlp_projector[::2]]
        call = Call.pool_linear(x.shape, table, shapes[0], dtype, len(shapes) > 1)
        calls = [call, *(Call.dact_linear(call.rows, shape, dtype) for shape in shapes[1:])]
        choices = {call: fastest(x.device, call) for call in calls}
        told = "; ".join(
            f"{c}: {choice.backend} ({choice.reason})" for c, choice in choices.items()
        )
        return plan._replace(backend=choices[call].backend, reason=told)

    def _check_layers(self, like: torch.Tensor) -> None:
        """Raise what a fused call raises for layers that do not fit tokens like ``like``."""
        name, dtype = "x", like.dtype
        for linear in self.mlp_projector[::2]:
            x = like.new_empty(0, 0, linear.in_features, dtype=dtype)
            dtype = functional.check_layer(name, x, linear.weight, linear.bias) or dtype
            name = "hidden"

    def _plan(self, x: torch.Tensor | None) -> Plan:
        like = self._like(x)
        choice = self._choice(like)
        path, problem = self._path(like)
        backend = "eager" if path == "modules" else choice.backend
        return Plan(backend, path, noted(problem or choice.reason))

    def _choice(self, like: torch.Tensor) -> Choice:
        dtype = functional.autocast_dtype(like) or like.dtype
        return choose(self.backend, like.device, dtype)

    def _path(self, like: torch.Tensor) -> tuple[str, str | None]:
        """The way a call with tokens like these takes, and why it is not fused."""
        problem = changed_sampler(self.sampler, self._side)
        if problem is None and not ordinary(like):
            problem = f"x is a {type(like).__name__}"
        if problem:
            return "modules", problem
        problem = unreadable(self.mlp_projector)
        return "pooled" if problem else "fused", problem

    def _like(self, x: torch.Tensor | None) -> torch.Tensor:
        """``x`` or a parameter; a quantised MLP has none."""
        return x if x is not None else next(self.parameters(), torch.empty(0))

    def _check(self, x: torch.Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        """The grid of the tokens ``x``, once they are what the projector takes."""
        check_tokens("x", x)
        tokens, channels = x.shape[1], x.shape[2]
        if channels != self.mm_hidden_size:
            raise ValueError(
                f"x must have mm_hidden_size = {self.mm_hidden_size} channels, got {channels}"
            )
        if grid is None:
            side = square_side("x's token count", tokens, "; pass grid=(height, width)")
            return side, side
        height, width = check_grid("grid", grid)
        if height * width != tokens:
            raise ValueError(f"grid {height}x{width} does not hold the {tokens} tokens of x")
        return height, width


def changed_sampler(sampler: nn.Module, side: int) -> str | None:
    """Why ``sampler`` must be called; None if it pools to side x side tokens and does no more."""
    if plain(sampler, nn.AdaptiveAvgPool2d) and _square_output(sampler) == side:
        return foreign_global_hook()
    return "sampler was changed or is hooked"


def unreadable(mlp: nn.Module) -> str | None:
    """Why ``mlp_projector`` must be called and its weights not read; None if they can be."""
    if not plain(mlp, nn.Sequential):
        return "mlp_projector was replaced or is hooked"
    for i, child in enumerate(children_of(mlp).values()):
        if not plain(child, nn.GELU if i % 2 else nn.Linear):
            return f"mlp_projector[{i}] is {type(child).__name__}, or hooked"
        if i % 2:
            if child.approximate != "none":
                return f"mlp_projector[{i}] is an approximate GELU"
        elif not materialised(child):
            return f"mlp_projector[{i}] has partitioned or special parameters"
    return None if len(mlp) % 2 else "mlp_projector does not end with a linear layer"


def project(x: torch.Tensor, mlp: nn.Sequential, stencil: Stencil, backend: str) -> torch.Tensor:
    """Tokens x [B, n, K], pooled and projected by an MLP that is not :func:`unreadable`."""
    # The parameters as `unreadable` has seen them; a module's attributes are slow to look up.
    first, *rest = [parameters_of(linear) for linear in [*children_of(mlp).values()][::2]]
    activation = "gelu" if rest else None
    w, bias = first["weight"], first["bias"]
    y = functional.pool_linear(x, w, bias, stencil, activation, backend=backend)
    for i, p in enumerate(rest, 1):
        activation = "gelu" if i < len(rest) else None
        y = functional.act_linear(y, p["weight"], p["bias"], activation, backend=backend)
    return y


def _square_output(sampler: nn.Module | None) -> int | None:
    """The side of the square that an average pooling makes; None if it is no such pooling."""
    if not isinstance(sampler, nn.AdaptiveAvgPool2d):
        return None
    size = sampler.output_size
    sides = {size} if isinstance(size, int) else set(size)
    return sides.pop() if len(sides) == 1 else None
