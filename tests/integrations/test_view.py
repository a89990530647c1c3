"""Is a projector's output that is not computed yet a tensor for all that a model may do to it?"""

import copy
from contextlib import nullcontext

import pytest
import torch
from stock.touching import Scale, Touching, assert_equal, touching
from torch import nn
from torch.utils.checkpoint import checkpoint


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


def changed_past_python(f):
    g = f.exp()
    with torch._C.DisableTorchFunctionSubclass():
        f.mul_(2)
    return f + g + Scale.apply(f)


def returned_past_python(f):
    with torch._C.DisableTorchFunctionSubclass():
        g = torch.ops.aten.lift_fresh(f)
    return g * f


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


def hooked_then_called(f):
    if f.requires_grad:
        f.register_hook(lambda g: 3 * g)
    return Scale.apply(f) + f


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
    "changed past Python": changed_past_python,
    "returned past Python": returned_past_python,
    "called twice": called_twice,
    "requires_grad_": required,
    "hook": hooked,
    "hook, then called": hooked_then_called,
    "dict": in_a_dict,
    "out": lambda f: torch.add(f.detach(), 1, out=torch.empty(0, dtype=f.dtype)),
    "numpy": lambda f: torch.from_numpy(f.detach().float().numpy()),
    "deep copy": lambda f: copy.deepcopy(f.detach()),
    "foreach": lambda f: torch._foreach_mul([f], 2)[0],
    "strides": lambda f: torch.as_strided(f, f.shape, f.stride()),
}


MODES = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=[*MODES])
@pytest.mark.parametrize("touch", TOUCHES.values(), ids=[*TOUCHES])
def test_as_the_stock_model(touch, mode):
    stock, fused = touching(touch=touch)
    x = torch.randn(6, 49, 8).double()
    with mode():
        if torch.is_autocast_enabled("cpu"):
            assert_equal(stock.float(), fused.float(), x.float(), near=0.05)
        else:
            assert_equal(stock, fused, x)


def without_gradients(projector, images):
    with torch.no_grad():
        return projector(images)


def required_later(projector, images):
    f = without_gradients(projector, images)
    return required(f)


def in_parts_without_gradients(projector, images):
    f = projector(images)
    with torch.no_grad():
        one, other = f.split(3)
    return torch.cat([f[:3] + one, other])


def as_function(projector, images):
    class Negative(torch.autograd.Function):
        forward = staticmethod(lambda ctx, images: projector(images))
        backward = staticmethod(lambda ctx, dy: dy[..., :8].neg())

    return Negative.apply(images)


def looked_at(projector, images):
    f = projector(images)
    assert f.norm() > 0
    return f


CALLS = {
    "without gradients": without_gradients,
    "required later": required_later,
    "in parts without gradients": in_parts_without_gradients,
    "checkpoint": lambda p, x: checkpoint(p.__call__, x, use_reentrant=False),
    "reentrant checkpoint": lambda p, x: checkpoint(p.__call__, x, use_reentrant=True),
    "reentrant checkpoint, looked at": lambda p, x: checkpoint(
        lambda x: looked_at(p, x), x, use_reentrant=True
    ),
    "function": as_function,
    "twice": lambda p, x: p(torch.cat([p(x), x], -1)[..., :8]),
    "strides": lambda p, x: p(x.mT.contiguous().mT),
    "frames last": lambda p, x: p(x.permute(1, 2, 0).contiguous().permute(2, 0, 1)),
}


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("encode", CALLS.values(), ids=[*CALLS])
def test_ways_to_call_the_projector(encode, mode, layers):
    projector = nn.Linear(8, 12) if layers == 1 else None
    with mode():
        assert_equal(*touching(projector, encode=encode))


class Pooling(Touching):
    """Pools all at once."""

    def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
        return self.get_2dPool(self.encode_images(torch.cat(list(images))))


@pytest.mark.parametrize("encode", CALLS.values(), ids=[*CALLS])
def test_pooling_what_was_called_in_some_way(encode):
    assert_equal(*touching(encode=encode, kind=Pooling))


@pytest.mark.parametrize("made", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
def test_pooled_in_another_mode_than_made(made, pooled):
    class Changing(Touching):
        def forward(self, images):
            return self.prepare_inputs_labels_for_multimodal(images)

        def prepare_inputs_labels_for_multimodal(self, images):
            with torch.inference_mode(made):
                f = self.encode_images(images)
            with torch.inference_mode(pooled):
                return self.get_2dPool(f)

    x = torch.randn(6, 49, 8).double()
    got, want = (model(x) for model in touching(kind=Changing))
    assert got.is_inference() == want.is_inference()
    assert got.requires_grad == want.requires_grad
    torch.testing.assert_close(got, want)


def test_an_activation_in_place():
    projector = nn.Sequential(nn.Linear(8, 10), nn.SiLU(inplace=True), nn.Linear(10, 12))
    assert_equal(*touching(projector, touch=lambda f: f + torch.cat([g * 2 for g in f.split(2)])))


def test_tensors_of_another_kind():
    class Own(torch.Tensor):
        pass

    def touch(f):
        assert isinstance(f, Own)
        return f

    stock, fused = touching(touch=touch)
    x = torch.randn(6, 49, 8).double().as_subclass(Own)
    got, want = (model([x]) for model in (fused, stock))
    assert type(got) is type(want) is Own
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad])
@pytest.mark.parametrize("reentrant", [True, False])
def test_pooling_in_a_checkpoint(reentrant, mode):
    class Checkpointing(Touching):
        def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
            features = self.encode_images(torch.cat(images)).split(3)
            features = [checkpoint(self.get_2dPool, f, use_reentrant=reentrant) for f in features]
            return torch.cat(features)

    with mode():
        assert_equal(*touching(kind=Checkpointing))


@pytest.mark.parametrize("layers", [1, 2])
def test_autocast_that_ended_before_the_output_is_wanted(layers):
    def encode(projector, images):
        with torch.autocast("cpu", torch.bfloat16):
            f = projector(images)
        assert f.dtype == torch.bfloat16
        return f

    for touch in (lambda f: f, Scale.apply):
        projector = nn.Linear(8, 12) if layers == 1 else None
        models = touching(projector, encode=encode, touch=touch)
        stock, fused = (model.float() for model in models)
        assert_equal(stock, fused, torch.randn(6, 49, 8), near=0.05)


def test_hooks_of_parameters_fire_once():
    stock, fused = touching(touch=Scale.apply)
    for model in (stock, fused):
        for p in model.parameters():
            p.register_hook(lambda g: 3 * g)
    assert_equal(stock, fused)


def test_gradients_of_functions():
    stock, fused = touching()
    x = torch.randn(6, 49, 8).double()

    def gradients(model):
        def loss(parameters):
            return torch.func.functional_call(model, parameters, (x.split(3), ["video"])).sum()

        return torch.func.grad(loss)(dict(model.named_parameters()))

    torch.testing.assert_close(gradients(fused), gradients(stock))


def test_a_compiled_function_of_the_output():
    touch = torch.compile(lambda f: (f * 2).sin(), backend="aot_eager")
    assert_equal(*touching(touch=touch))
