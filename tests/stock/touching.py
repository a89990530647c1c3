"""Models that do something to a projector's output before it is pooled."""

import copy

import torch

from deco_kernels import fuse
from stock import LlavaLike


class Scale(torch.autograd.Function):
    forward = staticmethod(lambda ctx, x: x * 2)
    backward = staticmethod(lambda ctx, dy: dy * 2)


class Touching(LlavaLike):
    """Does something to what the projector returns, and calls the projector in some way."""

    touch = staticmethod(lambda f: f)
    encode = staticmethod(lambda projector, images: projector(images))

    def encode_images(self, images):
        return self.touch(self.encode(self.get_model().mm_projector, images))


def touching(projector=None, kind=Touching, **ways):
    stock = kind(projector=projector).double()
    for name, way in ways.items():
        setattr(stock, name, way)
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


def assert_equal(stock, fused, x=None, near=None):
    x = torch.randn(6, 49, 8).double() if x is None else x
    got, want = results(fused, x), results(stock, x)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert (a.dtype, a.requires_grad) == (b.dtype, b.requires_grad)
            if near is None:
                torch.testing.assert_close(a, b)
            else:
                assert (a - b).norm() <= near * b.norm()
