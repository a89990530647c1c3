"""How does torch see it? The verbs as registered operators, opaque to torch.compile, with fakes."""

import torch

from . import backends
from .stencil import Table
from .tuning.call import Call

_library = torch.library.Library("deco_kernels", "DEF")
_library.define(
    "pool(Tensor x, Tensor index, Tensor weight, bool ragged, str geometry,"
    " ScalarType dtype, str? act, str backend) -> Tensor"
)
_library.define(
    "dact_pool(Tensor dp, Tensor index, Tensor weight, bool ragged, Tensor z, str act,"
    " str backend) -> Tensor"
)
_library.define(
    "pool_linear(Tensor x, Tensor index, Tensor weight, bool ragged, str geometry,"
    " Tensor w, Tensor? bias, str? activation, bool keep_z, str? act, str backend)"
    " -> (Tensor p, Tensor z, Tensor g)"
)
_library.define(
    "dact_linear(Tensor dy, Tensor w, Tensor z, bool want_g, bool want_db, str backend)"
    " -> (Tensor dz, Tensor g, Tensor db)"
)

Three = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Some = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def pool(
    x: torch.Tensor, table: Table, dtype: torch.dtype, act: str | None, backend: str
) -> torch.Tensor:
    """The verb ``pool`` of a backend; "eager" is torch's own operators, which need no wrapping."""
    if backend == "eager":
        return backends.get("eager").pool(x, table, dtype, act)
    return torch.ops.deco_kernels.pool.default(x, *table, dtype, act, backend)


def dact_pool(
    dp: torch.Tensor, table: Table, z: torch.Tensor, act: str, backend: str
) -> torch.Tensor:
    """The verb ``dact_pool`` of a backend."""
    if backend == "eager":
        return backends.get("eager").dact_pool(dp, table, z, act)
    return torch.ops.deco_kernels.dact_pool.default(dp, *table[:3], z, act, backend)


def pool_linear(
    x: torch.Tensor,
    table: Table,
    w: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    keep_z: bool,
    act: str | None,
    backend: str,
) -> Some:
    """The verb ``pool_linear`` of a backend."""
    if backend == "eager":
        return backends.get("eager").pool_linear(x, table, w, bias, activation, keep_z, act)
    op = torch.ops.deco_kernels.pool_linear.default
    p, z, g = op(x, *table, w, bias, activation, keep_z, act, backend)
    return p, z if keep_z else None, None if activation is None else g


def dact_linear(
    dy: torch.Tensor, w: torch.Tensor, z: torch.Tensor, want_g: bool, want_db: bool, backend: str
) -> Some:
    """The verb ``dact_linear`` of a backend."""
    if backend == "eager":
        return backends.get("eager").dact_linear(dy, w, z, want_g, want_db)
    op = torch.ops.deco_kernels.dact_linear.default
    dz, g, db = op(dy, w, z, want_g, want_db, backend)
    return dz, g if want_g else None, db if want_db else None


def _filled(like: torch.Tensor, *outputs: torch.Tensor | None) -> Three:
    """An operator's outputs are tensors: what was not asked for is an empty one."""
    return tuple(like.new_empty(0) if t is None else t for t in outputs)


def _refuse_grad(*tensors: torch.Tensor | None) -> None:
    """Raise where autograd would look on: it is taught in `functional`, outside the operators."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError("operators do not differentiate: call pool, pool_linear or act_linear")


# The one place where sizes are known also under torch.compile: so "auto" is resolved in here.


def _pool(x, index, weight, ragged, geometry, dtype, act, backend) -> torch.Tensor:
    _refuse_grad(x)
    if backend == "auto":
        backend = backends.preferred(x.device, x.dtype).backend
    return backends.get(backend).pool(x, Table(index, weight, ragged, geometry), dtype, act)


def _dact_pool(dp, index, weight, ragged, z, act, backend) -> torch.Tensor:
    _refuse_grad(dp, z)
    if backend == "auto":
        backend = backends.preferred(z.device, z.dtype).backend
    return backends.get(backend).dact_pool(dp, Table(index, weight, ragged, ""), z, act)


def _pool_linear(
    x, index, weight, ragged, geometry, w, bias, activation, keep_z, act, backend
) -> Three:
    _refuse_grad(x, w, bias)
    table = Table(index, weight, ragged, geometry)
    bias = None if bias is None else bias.contiguous()  # the kernels read no strides of it
    if backend == "auto":
        gelu = activation is not None
        call = Call.pool_linear(x.shape, index.shape, w.shape, w.dtype, gelu, act)
        backend = backends.fastest(x.device, call).backend
    out = backends.get(backend).pool_linear(x, table, w, bias, activation, keep_z, act)
    return _filled(w, *out)


def _dact_linear(dy, w, z, want_g, want_db, backend) -> Three:
    _refuse_grad(dy, w, z)
    if backend == "auto":
        backend = backends.fastest(z.device, Call.dact_linear(len(z), w.shape, z.dtype)).backend
    return _filled(z, *backends.get(backend).dact_linear(dy, w, z, want_g, want_db))


_library.impl("pool", _pool, "CompositeExplicitAutograd")
_library.impl("dact_pool", _dact_pool, "CompositeExplicitAutograd")
_library.impl("pool_linear", _pool_linear, "CompositeExplicitAutograd")
_library.impl("dact_linear", _dact_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("deco_kernels::pool", lib=_library)
def _(x, index, weight, ragged, geometry, dtype, act, backend) -> torch.Tensor:
    return x.new_empty(x.shape[0], index.shape[0], x.shape[2], dtype=dtype)


@torch.library.register_fake("deco_kernels::dact_pool", lib=_library)
def _(dp, index, weight, ragged, z, act, backend) -> torch.Tensor:
    return z.new_empty(z.shape)


@torch.library.register_fake("deco_kernels::pool_linear", lib=_library)
def _(x, index, weight, ragged, geometry, w, bias, activation, keep_z, act, backend) -> Three:
    p = w.new_empty(x.shape[0], index.shape[0], x.shape[2])
    z = w.new_empty(*p.shape[:2], w.shape[0])
    return _filled(w, p, z if keep_z else None, None if activation is None else torch.empty_like(z))


@torch.library.register_fake("deco_kernels::dact_linear", lib=_library)
def _(dy, w, z, want_g, want_db, backend) -> Three:
    g = torch.empty_like(z) if want_g else None
    return _filled(z, torch.empty_like(z), g, z.new_empty(z.shape[1]) if want_db else None)
