"""Is a projector's output that is not computed yet a tensor for all that a model may do to it?"""

import collections
import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from stock import LlavaLike
from torch import nn
from torch.utils.checkpoint import checkpoint

from deco_kernels import fuse
from deco_kernels.integrations.tail import Tail
from deco_kernels.integrations.view import Unfinished

Named = collections.namedtuple("Named", "features count")


class Scale(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * 2)
    backward = staticmethod(lambda ctx, dy: dy * 2)


class Unchanged(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x)
    backward = staticmethod(lambda ctx, dy: -dy)


class Viewed(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x.view_as(x))
    backward = staticmethod(lambda ctx, dy: -dy)


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    backward = staticmethod(lambda ctx, dy: dy * 2)


class SameInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        x.mul_(2)
        return x

    backward = staticmethod(lambda ctx, dy: dy * 2)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    backward = staticmethod(lambda ctx, dy: 2 * dy * ctx.saved_tensors[0])


def with_attribute(f):
    f.foo = 1
    assert f.foo == 1
    return f


def measured_first(f):
    """As code that logs does: what is computed there is used with gradients later."""
    with torch.no_grad():
        f.norm()
    with torch.autocast("cpu", enabled=False):
        f.mean()
    with torch.inference_mode():
        f.std()
    return f


def changed_then_called(f):
    f.mul_(2)
    f[:, 0] = 1
    f += 1
    return Scale.apply(f)


def changed_in_statements(f):
    f.mul_(2)
    f[:, 1:3] *= 3
    Scale.apply(f)
    f.sub_(1)
    return Scale.apply(f)


def called_twice(f):
    return Scale.apply(f) + Scale.apply(f) * f


def required(f):
    if not f.requires_grad and not torch.is_inference_mode_enabled():
        f.requires_grad_()
    return Scale.apply(f)


def hooked(f):
    if f.requires_grad:
        f.register_hook(lambda g: 3 * g)
    return f * 2


def in_a_dict(f):
    return torch.cat(copy.copy({"a": f, "b": [f]})["b"])


TOUCHES = {
    "function": Scale.apply,
    "function that returns its input": Unchanged.apply,
    "function that returns a view": Viewed.apply,
    "function in place": InPlace.apply,
    "function in place, same object": SameInPlace.apply,
    "function that saves its input": Square.apply,
    "reentrant checkpoint": lambda f: checkpoint(torch.sin, f, use_reentrant=True),
    "checkpoint": lambda f: checkpoint(torch.sin, f, use_reentrant=False),
    "vmap": lambda f: torch.vmap(lambda x: x * 2 + x.mean())(f),
    "vmap over the last axis": lambda f: torch.vmap(lambda x: x.sin(), 2, 2)(f),
    "as_tensor": torch.as_tensor,
    "asarray": lambda f: torch.asarray(f) * 2,
    "tensor": lambda f: torch.tensor(f.detach()),
    "abs": abs,
    "floor division": lambda f: 1 // f.detach(),
    "modulo": lambda f: 3 % f.detach(),
    "and": lambda f: f * ((f > 0) & (f < 1)),
    "split by name": lambda f: torch.cat(f.split(split_size=2)),
    "torch.split by name": lambda f: torch.cat(torch.split(f, split_size_or_sections=[4, 2])),
    "split, last axis": lambda f: torch.cat(f.split(5, dim=-1), -1),
    "chunk": lambda f: torch.cat(f.chunk(4)),
    "chunk, last axis": lambda f: torch.cat(torch.chunk(f, 2, -1), -1),
    "slices": lambda f: torch.cat([f[4:], f[:4], f[::2], f[..., :5, :]][:2]),
    "attribute": with_attribute,
    "measured first": measured_first,
    "changed, then called": changed_then_called,
    "changed in statements": changed_in_statements,
    "called twice": called_twice,
    "requires_grad_": required,
    "hook": hooked,
    "dict": in_a_dict,
    "out": lambda f: torch.add(f.detach(), 1, out=torch.empty(0, dtype=f.dtype)),
    "numpy": lambda f: torch.from_numpy(f.detach().float().numpy()),
    "deep copy": lambda f: copy.deepcopy(f.detach()),
    "foreach": lambda f: torch._foreach_mul([f], 2)[0],
    "strides": lambda f: torch.as_strided(f, f.shape, f.stride()),
}


class Touching(LlavaLike):
    touch = staticmethod(lambda f: f)

    def encode_images(self, images):
        return self.touch(super().encode_images(images))


def touching(touch, kind=Touching):
    stock = kind().double()
    stock.touch = touch
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    return stock, fused


def results(model, x):
    """The output, and the gradients of tokens and parameters."""
    x = x.detach().requires_grad_(not x.is_inference())
    y = model(x.split([2, 3, 1]), ["image", "video", "video"])
    assert type(y) is torch.Tensor
    if not y.requires_grad:
        return [y]
    y.square().sum().backward()
    return [y, *(t.grad for t in (x, *model.parameters()))]


MODES = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=[*MODES])
@pytest.mark.parametrize("touch", TOUCHES.values(), ids=[*TOUCHES])
def test_as_the_stock_model(touch, mode):
    stock, fused = touching(touch)
    x = torch.randn(6, 49, 8).double()
    near = {}
    if mode is MODES["autocast"]:
        stock, fused, x, near = stock.float(), fused.float(), x.float(), {"rtol": 0.05, "atol": 0.1}
    with mode():
        got, want = results(fused, x), results(stock, x)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
            torch.testing.assert_close(a, b, **near)
