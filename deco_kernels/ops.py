"""How does torch see it? The verbs as registered operators, with fakes, derivatives and FLOPs.

Kernels run in operators, which torch.compile, torch.export and the profiler take as they are.
Torch's own operators need no wrapping: with plain tensors a Function computes by them, which costs
less, and has the derivatives of the operators; under a tracer nothing hides them at all.
"""

from collections.abc import Callable
from functools import wraps
from types import ModuleType

import torch

from . import backends
from .backends import eager
from .host.imports import when_imported
from .stencil import Places
from .tuning.call import Call

_PLACES = (
    "Tensor? index, Tensor? weight, Tensor? column_index, Tensor? column_weight,"
    " bool ragged, bool columns_ragged, str kind, SymInt[] sizes"
)
_library = torch.library.Library("deco_kernels", "DEF")
_library.define(
    f"pool(Tensor x, {_PLACES}, bool transposed, ScalarType dtype, str backend) -> Tensor"
)
_library.define(f"dact_pool(Tensor dp, {_PLACES}, Tensor z, str act, str backend) -> Tensor")
_library.define(
    f"pool_linear(Tensor x, {_PLACES}, Tensor w, Tensor? master, Tensor? bias, str? activation,"
    " bool keep_z, str? act, str backend) -> (Tensor p, Tensor z, Tensor g)"
)
_library.define(
    "act_linear(Tensor z, Tensor? z_bias, Tensor g, Tensor w, Tensor? master, Tensor? bias,"
    " str backend) -> Tensor"
)
_library.define(
    "dact_linear(Tensor dy, Tensor w, Tensor z, bool want_g, bool want_db, str backend)"
    " -> (Tensor dz, Tensor g, Tensor db)"
)

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def traced() -> bool:
    """Whether a tracer looks on, which should see torch's own operators and no Function."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _direct(t: torch.Tensor, backend: str) -> bool:
    """Whether torch's own operators are called here and now."""
    return backend == "eager" and type(t) in _PLAIN and not torch.compiler.is_compiling()


def _filled(like: torch.Tensor, *outputs: torch.Tensor | None) -> Three:
    """An operator's outputs are tensors: what was not asked for is an empty one."""
    return tuple([like.new_empty(0) if t is None else t for t in outputs])


# What the operators do. The one place where sizes are known also under torch.compile: so "auto" is
# resolved in here.


def _pool(x, *args) -> torch.Tensor:
    *places, transposed, dtype, backend = args
    table = Places(*places).table(transposed, x.device, x.dtype)
    if backend == "auto":
        backend = backends.preferred(x.device, x.dtype).backend
    return backends.get(backend).pool(x, table, dtype).data  # a Function's view cannot change


def _dact_pool(dp, *args) -> torch.Tensor:
    *places, z, act, backend = args
    table = Places(*places).table(True, z.device, z.dtype)
    if backend == "auto":
        backend = backends.preferred(z.device, z.dtype).backend
    return backends.get(backend).dact_pool(dp, table, z, act)


def _pool_linear(x, *args) -> Three:
    *places, w, _master, bias, activation, keep_z, act, backend = args
    table = Places(*places).table(False, x.device, x.dtype)
    bias = None if bias is None else bias.contiguous()  # the kernels read no strides of it
    if backend == "auto":
        gelu = activation is not None
        call = Call.pool_linear(x.shape, table.index.shape, w.shape, w.dtype, gelu, act)
        backend = backends.fastest(x.device, call).backend
    return _filled(
        w, *backends.get(backend).pool_linear(x, table, w, bias, activation, keep_z, act)
    )


def _act_linear(_z, _z_bias, g, w, _master, bias, _backend) -> torch.Tensor:
    return eager.product(g, w, bias)


def _dact_linear(dy, w, z, want_g, want_db, backend) -> Three:
    if backend == "auto":
        backend = backends.fastest(z.device, Call.dact_linear(len(z), w.shape, z.dtype)).backend
    return _filled(z, *backends.get(backend).dact_linear(dy, w, z, want_g, want_db))


# What they return, for tracers.


def _fake_pool(x, *args) -> torch.Tensor:
    *places, transposed, dtype, _ = args
    return x.new_empty(x.shape[0], Places(*places).n_out(transposed), x.shape[2], dtype=dtype)


def _fake_dact_pool(_dp, *args) -> torch.Tensor:
    return args[-3].new_empty(args[-3].shape)


def _fake_pool_linear(x, *args) -> Three:
    *places, w, _, _, activation, keep_z, _, _ = args
    p = w.new_empty(x.shape[0], Places(*places).n_out(False), x.shape[2])
    z = w.new_empty(*p.shape[:2], w.shape[0])
    return _filled(w, p, z if keep_z else None, None if activation is None else torch.empty_like(z))


def _fake_act_linear(_z, _z_bias, g, w, _master, _bias, _backend) -> torch.Tensor:
    return g.new_empty(*g.shape[:2], w.shape[0])


def _fake_dact_linear(_dy, _w, z, want_g, want_db, _backend) -> Three:
    g = torch.empty_like(z) if want_g else None
    return _filled(z, torch.empty_like(z), g, z.new_empty(z.shape[1]) if want_db else None)


# Their derivatives: what is kept, and what becomes of it.


def _once(backward: Callable) -> Callable:
    """A second derivative is an error, also where the gradients that come in are constants."""

    @wraps(backward)
    def once(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # by create_graph=True
            raise RuntimeError("deco_kernels' functions have no double backward: no create_graph")
        return backward(ctx, *grads)

    return once


def _keep_places(ctx, places: Places, *tensors: torch.Tensor | None) -> None:
    ctx.save_for_backward(*tensors, *places[:4])
    ctx.places = places[4:]


def _kept(ctx) -> tuple[list[torch.Tensor | None], Places]:
    *tensors, a, b, c, d = ctx.saved_tensors
    return tensors, Places(a, b, c, d, *ctx.places)


def _pool_back(
    d: torch.Tensor, places: Places, transposed: bool, dtype: torch.dtype, backend: str
) -> torch.Tensor:
    """The transpose of a pooling; ``transposed`` says of which side that is."""
    if _direct(d, backend):
        return eager.pool(d, places.table(transposed, d.device, d.dtype), dtype)
    return torch.ops.deco_kernels.pool.default(d, *places, transposed, dtype, backend)


def _setup_pool(ctx, inputs, output) -> None:
    x, *places, transposed, _, backend = inputs
    _keep_places(ctx, Places(*places))
    ctx.how = not transposed, x.dtype, backend
    ctx.count = len(inputs)


@_once
def _pool_backward(ctx, dp):
    _, places = _kept(ctx)
    return _pool_back(dp, places, *ctx.how), *(None,) * (ctx.count - 1)


_X, _W, _MASTER, _BIAS = 0, 9, 10, 11  # of the operator's arguments


def _setup_pool_linear(ctx, inputs, output) -> None:
    x, *places, w, _, _, _, _, act, backend = inputs
    p, _, g = output
    needs = ctx.needs_input_grad
    _keep_places(
        ctx,
        Places(*places),
        w if needs[_X] else None,
        p if needs[_W] or needs[_MASTER] else None,
        x if needs[_X] and act is not None else None,
    )
    ctx.how, ctx.count = (x.dtype, act, backend), len(inputs)
    ctx.mark_non_differentiable(p, g)
    ctx.set_materialize_grads(False)


@_once
def _pool_linear_backward(ctx, _dp, dz, _dg):
    grads, needs = [None] * ctx.count, ctx.needs_input_grad
    if dz is None:
        return tuple(grads)
    (w, p, x), places = _kept(ctx)
    dtype, act, backend = ctx.how
    flat = dz.reshape(-1, dz.shape[-1])
    if needs[_X]:
        dp = (flat @ w).view(*dz.shape[:2], w.shape[1])
        if act is None:
            grads[_X] = _pool_back(dp, places, True, dtype, backend)
        elif _direct(dp, backend):
            grads[_X] = eager.dact_pool(dp, places.table(True, x.device, x.dtype), x, act)
        else:
            grads[_X] = torch.ops.deco_kernels.dact_pool.default(dp, *places, x, act, backend)
    if p is not None:
        grads[_W], grads[_MASTER] = _to_weight(flat.T @ p.view(-1, p.shape[-1]), needs[_MASTER])
    if needs[_BIAS]:
        grads[_BIAS] = flat.sum(0)
    return tuple(grads)


def _to_weight(dw: torch.Tensor, has_master: bool) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a weight and of the parameter that it is autocast's copy of."""
    return (None, dw.float()) if has_master else (dw, None)


def _setup_act_linear(ctx, inputs, output) -> None:
    z, _, _, w, _, _, backend = inputs
    ctx.save_for_backward(z, w)
    ctx.backend = backend


@_once
def _act_linear_backward(ctx, dy):
    z, w = ctx.saved_tensors
    needs_z, needs_z_bias, _, needs_w, needs_master, needs_bias, _ = ctx.needs_input_grad
    flat, flat_z = dy.reshape(-1, dy.shape[-1]), z.view(-1, z.shape[-1])
    wanted = needs_w or needs_master, needs_z_bias
    if _direct(dy, ctx.backend):
        dz, g, dz_bias = eager.dact_linear(flat, w, flat_z, *wanted)
    else:
        op = torch.ops.deco_kernels.dact_linear.default
        dz, g, dz_bias = op(flat, w, flat_z, *wanted, ctx.backend)
    dw, dmaster = _to_weight(flat.T @ g, needs_master) if wanted[0] else (None, None)
    return (
        dz.view_as(z) if needs_z else None,
        dz_bias if needs_z_bias else None,
        None,
        dw,
        dmaster,
        flat.sum(0) if needs_bias else None,
        None,
    )


def _function(name: str, forward: Callable, setup: Callable, backward: Callable) -> type:
    """The operator as a Function, whose name the profiler shows."""

    def run(ctx, *inputs):
        output = forward(*inputs)
        setup(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(run), "backward": staticmethod(backward)}
    return type(torch.autograd.Function)(
        f"deco_kernels::{name}", (torch.autograd.Function,), {**methods, "__module__": __name__}
    )


_CALLS: dict[str, tuple[Callable, type | None]] = {}


def _register(name: str, run: Callable, fake: Callable, *derivative) -> None:
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deco_kernels::{name}", fake, lib=_library)
    operator = getattr(torch.ops.deco_kernels, name)
    if derivative:
        setup, backward = derivative
        torch.library.register_autograd(
            f"deco_kernels::{name}", backward, setup_context=setup, lib=_library
        )
        _CALLS[name] = operator.default, _function(name, run, setup, backward)


_register("pool", _pool, _fake_pool, _setup_pool, _pool_backward)
_register("dact_pool", _dact_pool, _fake_dact_pool)
_register(
    "pool_linear",
    _pool_linear,
    _fake_pool_linear,
    _setup_pool_linear,
    _pool_linear_backward,
)
_register(
    "act_linear",
    _act_linear,
    _fake_act_linear,
    _setup_act_linear,
    _act_linear_backward,
)
_register("dact_linear", _dact_linear, _fake_dact_linear)


# What torch's FLOP counter is told.


def _no_flops(*args, **kwargs) -> int:
    return 0


def _pool_linear_flops(x, *args, out_shape=None, **kwargs) -> int:
    (batch, tokens, channels), *_ = out_shape
    features = args[_W - 1][0]
    return 2 * batch * tokens * channels * features


def _act_linear_flops(z, z_bias, g, w, *args, out_shape=None, **kwargs) -> int:
    return 2 * g[0] * g[1] * w[0] * w[1]


def _dact_linear_flops(dy, w, *args, out_shape=None, **kwargs) -> int:
    return 2 * dy[0] * w[0] * w[1]


def _register_flops(counter: ModuleType) -> None:
    for name, flops in {
        "pool": _no_flops,
        "dact_pool": _no_flops,
        "pool_linear": _pool_linear_flops,
        "act_linear": _act_linear_flops,
        "dact_linear": _dact_linear_flops,
    }.items():
        counter.register_flop_formula(getattr(torch.ops.deco_kernels, name))(flops)


when_imported("torch.utils.flop_counter", _register_flops)  # it imports Triton, so we do not


def call(name: str, first: torch.Tensor, *args):
    """A differentiable operator by its name; its last argument is the backend."""
    operator, function = _CALLS[name]
    if _direct(first, args[-1]):
        return function.apply(first, *args)
    return operator(first, *args)
