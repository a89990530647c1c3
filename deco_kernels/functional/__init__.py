"""What do I call? Pooling and linear layers that keep no activation for backward.

With kernels a call is one operator of `ops`. With torch's own operators it is a Function that keeps
as little, but where a tracer or a torch.func transform looks on, those operators themselves.
"""

import torch
import torch.nn.functional as F

from .. import ops
from ..backends import choose, eager
from ..host import private
from ..stencil import Places, Stencil
from .inputs import check_float, check_linear, check_ordinary, check_size, check_tokens

ACTIVATIONS = (None, "gelu")
TOKEN_ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "quick_gelu")  # before pooling


class Hidden:
    """What a linear layer followed by an activation hands to the next linear layer.

    Holds the pre-activation (differentiable, kept for backward), the activation (not kept) and the
    layer's bias, whose gradient the next layer's backward computes along with its own. So it is
    opaque and has exactly one use: :func:`act_linear`. Without a pre-activation the activation is
    an ordinary, perhaps differentiable one.
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
    backend, open_ = _backend("pool", backend, x, x.dtype)
    places = _places(x, stencil)
    if open_:
        return eager.traceable_pool(x, places, x.dtype)
    return ops.call("pool", x, *places, False, x.dtype, backend)


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
    found = _pooled_product("pool_linear", x, weight, bias, stencil, backend)
    places, w, master, bias, backend, open_ = found
    if open_:
        z = F.linear(eager.traceable_pool(x, places, w.dtype), w, bias)
        return z if activation is None else Hidden(None, F.gelu(z), None)
    if activation is None:
        return ops.call("pool_linear", x, *places, w, master, bias, None, True, None, backend)[1]
    keep_z = _any_requires_grad(x, weight, bias)
    own_bias = None if bias is None else bias.detach()
    args = w, master, own_bias, activation, keep_z, None, backend
    _, z, g = ops.call("pool_linear", x, *places, *args)
    return Hidden(z if keep_z else None, g, bias)


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
    found = _pooled_product("act_pool_linear", x, weight, bias, stencil, backend)
    places, w, master, bias, backend, open_ = found
    if bias is not None:
        stencil.check_average("pooling in front of a bias")
    if open_:
        return F.linear(eager.traceable_pool(x, places, w.dtype, activation), w, bias)
    args = w, master, bias, None, True, activation, backend
    return ops.call("pool_linear", x, *places, *args)[1]


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
    dtype = check_layer("hidden", g, weight, bias)
    backend, open_ = _backend("act_linear", backend, g, dtype or g.dtype)
    if open_:
        y = F.linear(g, weight, bias)
        return y if activation is None else Hidden(None, F.gelu(y), None)
    bias = _bias(bias, dtype, open_)
    own_bias = bias if activation is None or bias is None else bias.detach()
    if z is None:
        y = F.linear(g, weight, own_bias)
    else:
        w, master = _weight(weight, dtype, open_)
        y = ops.call("act_linear", z, z_bias, g, w, master, own_bias, backend)
    if activation is None:
        return y
    keep_z = _any_requires_grad(y, bias)
    with torch.no_grad():
        g = F.gelu(y)
    return Hidden(y if keep_z else None, g, bias)


@private.constant_in_graphs  # Dynamo cannot trace it before 2.13
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """What autocast would compute a linear layer of x in; None if it is off or leaves x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not _has_autocast(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _pooled_product(
    name: str,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stencil: Stencil,
    backend: str,
) -> tuple[Places, torch.Tensor, torch.Tensor | None, torch.Tensor | None, str, bool]:
    """What pooling x and a product with weight take, once they fit each other.

    The places, the weight and its master, the bias, the backend, and whether it stays open.
    """
    _check_pooling(x, stencil)
    dtype = check_layer("x", x, weight, bias)
    check_size((x.shape[0], stencil.n_out, max(weight.shape)), dtype or weight.dtype)
    backend, open_ = _backend(name, backend, x, dtype or weight.dtype)
    w, master = _weight(weight, dtype, open_)
    return _places(x, stencil), w, master, _bias(bias, dtype, open_), backend, open_


def _check_pooling(x: torch.Tensor, stencil: Stencil) -> None:
    check_tokens("x", x)
    check_ordinary("x", x)
    if not isinstance(stencil, Stencil):
        raise TypeError(f"stencil must be a Stencil, got {type(stencil).__name__}")
    if x.shape[1] != stencil.n_in:
        raise ValueError(f"x has {x.shape[1]} tokens, but {stencil} takes {stencil.n_in}")


def check_layer(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
) -> torch.dtype | None:
    """What autocast casts the layer to, which fits x [B, n, K]; None if it does not."""
    check_float("weight", weight)
    check_ordinary("weight", weight)
    dtype = None if weight.dtype == torch.float64 else autocast_dtype(x)
    check_linear(name, x, weight, bias, any_float=dtype is not None)
    return dtype


def _check_activation(activation: str | None) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")


def _backend(name: str, asked: str, x: torch.Tensor, dtype: torch.dtype) -> tuple[str, bool]:
    """The backend of a call, and whether its operators stay open: to a tracer or a transform."""
    backend = choose(asked, x.device, dtype).backend
    if torch.compiler.is_compiling() or not private.transforms_active():
        return backend, backend == "eager" and ops.traced()
    if asked not in ("auto", "eager"):
        raise RuntimeError(
            f"{name} with backend {asked!r} knows no torch.func transforms: pass backend='eager'"
        )
    return "eager", True


def _places(x: torch.Tensor, stencil: Stencil) -> Places:
    """Those of the stencil beside x; for a fake x, by which memory is estimated, fake ones."""
    mode = private.fake_mode_of(x)
    if mode is None or torch.compiler.is_compiling():
        return stencil.places(x.device, x.dtype)
    places = stencil.places(torch.device("cpu"), x.dtype)
    if places.kind:
        return places
    with mode:
        return Places(*(mode.from_tensor(t).to(x.device) for t in places[:4]), *places[4:])


def _any_requires_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def _weight(
    weight: torch.Tensor, dtype: torch.dtype | None, open_: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A weight as autocast wants it, and the parameter that gets its gradient if that is another.

    Autocast casts a parameter once in a region and keeps the copy, so we take that.
    """
    if dtype is None or weight.dtype == dtype:
        return weight, None
    copy = None if open_ else _copy_of_autocast(weight, dtype)
    if copy is None:
        return weight.to(dtype), None
    return copy.detach(), weight if torch.is_grad_enabled() else None


def _bias(bias: torch.Tensor | None, dtype: torch.dtype | None, open_: bool) -> torch.Tensor | None:
    """A bias as autocast wants it; differentiable."""
    if bias is None or dtype is None or bias.dtype == dtype:
        return bias
    copy = None if open_ else _copy_of_autocast(bias, dtype)
    usable = copy is not None and (copy.requires_grad or not torch.is_grad_enabled())
    return copy if usable else bias.to(dtype)


def _copy_of_autocast(parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Autocast's own copy of a weight [N, K] or a bias [N]; None if it keeps or shows none.

    Torch hands it to its own products only. An empty one shows it: a product keeps both factors.
    """
    leaf = parameter.is_leaf and parameter.requires_grad and parameter.dtype == torch.float32
    if not leaf or ops.traced() or not torch.is_autocast_cache_enabled():
        return None
    kept: list[torch.Tensor] = []
    nothing = parameter.new_empty(0, parameter.shape[0], dtype=dtype).requires_grad_()
    try:
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, id):
            torch.matmul(nothing, parameter)
    except RuntimeError:  # somebody has forbidden the hooks
        return None
    return next((t for t in kept if t.shape == parameter.shape and t.dtype == dtype), None)
