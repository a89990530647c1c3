"""How does it differentiate? Pooling and linear layers that keep no activation for backward."""

from collections.abc import Callable
from functools import wraps

import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from . import ops
from .backends import choose
from .checks import check_bias, check_float, check_linear, check_size, check_tokens
from .stencil import Stencil, Table

ACTIVATIONS = (None, "gelu")
TOKEN_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu")  # before pooling


class Hidden:
    """What a linear layer followed by an activation hands to the next linear layer.

    Holds the pre-activation (differentiable, kept for backward), the activation (not kept) and the
    layer's bias, whose gradient the next layer's backward computes along with its own. So it is
    opaque and has exactly one use: :func:`act_linear`.
    """

    __slots__ = ("_bias", "_g", "_z")

    def __init__(self, z: torch.Tensor | None, g: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._z, self._g, self._bias = z, g, bias

    @property
    def shape(self) -> torch.Size:
        return self._g.shape

    @property
    def activation(self) -> torch.Tensor:
        """The activation, detached: [B, M, N]."""
        return self._g.detach()


def _once(backward: Callable) -> Callable:
    """Torch's once_differentiable, but a second derivative is an error in any case.

    Torch's takes gradients for constants where those that come in are, and ours depend on more.
    """
    backward = once_differentiable(backward)

    @wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by create_graph=True
            raise RuntimeError("deco_kernels' functions have no double backward: no create_graph")
        return backward(ctx, *grads)

    return once


# The functions take their context in `forward`: with `setup_context` torch binds the arguments by
# `inspect` on every call, which costs more than all else that these functions do.


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, columns, backend):
        ctx.columns, ctx.backend = columns, backend
        return ops.pool(x, rows, x.dtype, None, backend)

    @staticmethod
    @_once
    def backward(ctx, dp):
        return ops.pool(dp, ctx.columns, dp.dtype, None, ctx.backend), None, None, None


class _PoolLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, rows, columns, activation, keep_z, act, backend):
        p, z, g = ops.pool_linear(x, rows, weight, bias, activation, keep_z, act, backend)
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        ctx.save_for_backward(
            weight if needs_x else None,
            p if needs_weight else None,
            x if needs_x and act is not None else None,
        )
        ctx.columns, ctx.dtype, ctx.act, ctx.backend = columns, x.dtype, act, backend
        if g is not None:
            ctx.mark_non_differentiable(g)
        ctx.set_materialize_grads(False)
        return z, g

    @staticmethod
    @_once
    def backward(ctx, dz, _dg):
        if dz is None:
            return (None,) * 9
        weight, p, x = ctx.saved_tensors
        flat = dz.reshape(-1, dz.shape[-1])
        dx = dw = db = None
        if ctx.needs_input_grad[0]:
            dp = (flat @ weight).view(*dz.shape[:2], weight.shape[1])
            if x is None:
                dx = ops.pool(dp, ctx.columns, ctx.dtype, None, ctx.backend)
            else:
                dx = ops.dact_pool(dp, ctx.columns, x, ctx.act, ctx.backend)
        if ctx.needs_input_grad[1]:
            dw = flat.T @ p.view(-1, p.shape[-1])
        if ctx.needs_input_grad[2]:
            db = flat.sum(0)
        return dx, dw, db, None, None, None, None, None, None


class _ActLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, z_bias, g, weight, bias, backend):
        ctx.save_for_backward(z, weight)
        ctx.backend = backend
        return F.linear(g, weight, bias)

    @staticmethod
    @_once
    def backward(ctx, dy):
        z, weight = ctx.saved_tensors
        needs_z, needs_z_bias, _, needs_weight, needs_bias, _ = ctx.needs_input_grad
        flat = dy.reshape(-1, dy.shape[-1])
        dz, g, dz_bias = ops.dact_linear(
            flat, weight, z.view(-1, z.shape[-1]), needs_weight, needs_z_bias, ctx.backend
        )
        return (
            dz.view_as(z) if needs_z else None,
            dz_bias if needs_z_bias else None,
            None,
            flat.T @ g if needs_weight else None,
            flat.sum(0) if needs_bias else None,
            None,
        )


def pool(x: torch.Tensor, stencil: Stencil, *, backend: str = "auto") -> torch.Tensor:
    """Pool tokens: ``P = S X``. The kernels sum in float32; "eager" is torch's own pooling.

    Args:
        x: tokens [B, n_in, K], floating point, any strides.
        stencil: the pooling, for n_in tokens.
        backend: "auto", "triton", "cuda", "composed" or "eager".

    Returns:
        Pooled tokens [B, n_out, K] of x's dtype.

    Raises:
        TypeError: x is not a floating-point tensor.
        ValueError: x is not [B, n_in, K], or no such backend.
        RuntimeError: the backend cannot run here.
    """
    _check_pooling(x, stencil)
    check_size((x.shape[0], stencil.n_out, x.shape[2]), x.dtype)
    backend = choose(backend, x.device, x.dtype).backend
    return _Pool.apply(x, *_tables(x, stencil), backend)


def pool_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stencil: Stencil,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor | Hidden:
    """Pool tokens and project them: ``Z = (S X) Wᵀ + b``. Keeps P for backward, never X.

    Under autocast the weight and bias are cast as ``F.linear`` would; x is read as it is.

    Args:
        x: tokens [B, n_in, K], floating point, any strides.
        weight: [N, K] of x's dtype.
        bias: [N] or None.
        stencil: the pooling, for n_in tokens.
        activation: None, or "gelu" (the exact, erf form) if an activation and another linear
            layer follow.
        backend: "auto", "triton", "cuda", "composed" or "eager".

    Returns:
        Z [B, n_out, N]; with an activation a :class:`Hidden` for :func:`act_linear`.

    Raises:
        TypeError: a tensor is not floating point, or dtypes differ.
        ValueError: a shape does not fit, or no such activation or backend.
        RuntimeError: tensors on different devices, or the backend cannot run here.
    """
    _check_activation(activation)
    x, weight, bias, tables, backend = _pooled_product(x, weight, bias, stencil, backend)
    if activation is None:
        return _PoolLinear.apply(x, weight, bias, *tables, None, True, None, backend)[0]
    keep_z = _any_requires_grad(x, weight, bias)
    detached = None if bias is None else bias.detach()
    z, g = _PoolLinear.apply(x, weight, detached, *tables, activation, keep_z, None, backend)
    return Hidden(z, g, bias)


def act_pool_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stencil: Stencil,
    activation: str | None = "gelu",
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Activate tokens, pool and project them: ``Y = (S act(X)) Wᵀ + b``. Keeps X and P.

    For a projector that pools its output: an average commutes with a linear layer,
    ``pool(g Wᵀ + b) = pool(g) Wᵀ + b``, and this is the product on pooled tokens only.

    Args:
        x: pre-activations [B, n_in, K], floating point, any strides.
        weight: [N, K] of x's dtype.
        bias: [N] or None.
        stencil: the pooling, for n_in tokens. With a bias its weights must sum to one.
        activation: "gelu" (the exact, erf form), "gelu_tanh", "silu", "quick_gelu"
            (``x * sigmoid(1.702 x)``) or None.
        backend: "auto", "triton", "cuda", "composed" or "eager".

    Returns:
        Y [B, n_out, N].

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pool_linear`; there is a bias, and the
            weights of an output do not sum to one.
    """
    if activation not in (None, *TOKEN_ACTIVATIONS):
        known = ", ".join(map(repr, TOKEN_ACTIVATIONS))
        raise ValueError(f"activation must be None or one of {known}, got {activation!r}")
    x, weight, bias, tables, backend = _pooled_product(x, weight, bias, stencil, backend)
    if bias is not None:
        stencil.check_average("pooling in front of a bias")
    return _PoolLinear.apply(x, weight, bias, *tables, None, True, activation, backend)[0]


def act_linear(
    hidden: Hidden,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor | Hidden:
    """The linear layer after an activation: ``Y = G Wᵀ + b``. Keeps Z for backward, never G.

    Args:
        hidden: what :func:`pool_linear` or this function returned for ``activation="gelu"``.
        weight: [N, K] of the hidden layer's dtype, K its channels.
        bias: [N] or None.
        activation: as in :func:`pool_linear`.
        backend: "auto", "triton", "cuda", "composed" or "eager".

    Returns:
        Y [B, M, N]; with an activation a :class:`Hidden` for the next call.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`pool_linear`.
    """
    if not isinstance(hidden, Hidden):
        raise TypeError(f"hidden must come from pool_linear or act_linear, got {type(hidden)}")
    _check_activation(activation)
    z, g, z_bias = hidden._z, hidden._g, hidden._bias
    weight, bias, _ = _autocast(g, weight, bias)
    check_linear("hidden", g, weight)
    check_bias(weight, bias)
    own_bias = bias if activation is None or bias is None else bias.detach()
    if z is None:
        y = F.linear(g, weight, own_bias)
    else:
        backend = choose(backend, g.device, g.dtype).backend
        y = _ActLinear.apply(z, z_bias, g, weight, own_bias, backend)
    if activation is None:
        return y
    keep_z = _any_requires_grad(y, bias)
    with torch.no_grad():
        g = F.gelu(y)
    return Hidden(y if keep_z else None, g, bias)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast would compute a linear layer of x in; None if it is off or leaves x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _pooled_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stencil: Stencil,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[Table, Table], str]:
    """What pooling x and a product with weight take, once they fit each other."""
    _check_pooling(x, stencil)
    weight, bias, autocast = _autocast(x, weight, bias)
    check_linear("x", x, weight, any_float=autocast)
    check_bias(weight, bias)
    check_size((x.shape[0], stencil.n_out, max(weight.shape)), weight.dtype)
    backend = choose(backend, x.device, weight.dtype).backend
    return x, weight, bias, _tables(x, stencil), backend


def _check_pooling(x: torch.Tensor, stencil: Stencil) -> None:
    check_tokens("x", x)
    if not isinstance(stencil, Stencil):
        raise TypeError(f"stencil must be a Stencil, got {type(stencil).__name__}")
    if x.shape[1] != stencil.n_in:
        raise ValueError(f"x has {x.shape[1]} tokens, but {stencil} takes {stencil.n_in}")


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")


def _tables(x: torch.Tensor, stencil: Stencil) -> tuple[Table, Table]:
    """Those of the stencil beside x; for a fake x, by which memory is estimated, fake ones."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if not isinstance(x, FakeTensor) or torch.compiler.is_compiling():
        return stencil.tables(x.device, dtype)
    rows, columns = stencil.tables("cpu", dtype)
    with x.fake_mode:
        return tuple(
            t._replace(
                index=x.fake_mode.from_tensor(t.index).to(x.device),
                weight=x.fake_mode.from_tensor(t.weight).to(x.device),
            )
            for t in (rows, columns)
        )


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, bool]:
    """Weight and bias as autocast wants them, and whether it is on for them."""
    dtype = autocast_dtype(x)
    if dtype is None:
        return weight, bias, False
    check_float("weight", weight)
    if weight.dtype == torch.float64:
        return weight, bias, False
    return weight.to(dtype), None if bias is None else bias.to(dtype), True
