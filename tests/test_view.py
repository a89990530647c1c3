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


MODES = {
    "training": nullcontext,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


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


@pytest.fixture
def products(monkeypatch):
    """The shapes of the products of whole outputs."""
    found, whole = [], Tail.whole
    monkeypatch.setattr(Tail, "whole", lambda self, z: found.append(z.shape) or whole(self, z))
    return found


KNOWN = {
    "shape": (lambda f: f.shape, (6, 49, 12)),
    "dtype": (lambda f: f.dtype, torch.float64),
    "device": (lambda f: f.device, torch.device("cpu")),
    "dim": (lambda f: (f.dim(), f.ndim), (3, 3)),
    "size": (lambda f: (*f.size(), f.size(-1), len(f)), (6, 49, 12, 12, 6)),
    "numel": (lambda f: (f.numel(), torch.numel(f), f.nelement()), (6 * 49 * 12,) * 3),
    "requires_grad": (lambda f: (f.requires_grad, f.is_leaf), (True, False)),
    "kind": (lambda f: (f.is_floating_point(), torch.is_floating_point(f)), (True, True)),
    "is_cuda": (lambda f: (f.is_cuda, f.layout, f.get_device()), (False, torch.strided, -1)),
    "isinstance": (lambda f: isinstance(f, torch.Tensor) and torch.is_tensor(f), True),
}
CUTS = {
    "split": lambda f: torch.split(f, [2, 4]),
    "split, by name": lambda f: f.split(split_size=4, dim=0),
    "split, last": lambda f: f.split(3, -3),
    "chunk": lambda f: f.chunk(chunks=2),
    "torch.chunk": lambda f: torch.chunk(f, 3, dim=0),
    "slices": lambda f: (f[2:], f[:2], f[::3], f[-4:][:1]),
    "split twice": lambda f: [part for half in f.split(3) for part in half.split([1, 2])],
}


@pytest.mark.parametrize(("read", "value"), KNOWN.values(), ids=[*KNOWN])
def test_what_is_known_is_read_without_a_product(products, read, value):
    def touch(f):
        assert read(f) == value
        return f

    stock, fused = touching(touch=touch)
    x = torch.randn(6, 49, 8).double()
    y, want = (model([x], ["video"]) for model in (fused, stock))
    assert products == []
    torch.testing.assert_close(y, want)


@pytest.mark.parametrize("cut", CUTS.values(), ids=[*CUTS])
def test_parts_are_pooled_in_front_of_the_last_layer(products, cut):
    class Cutting(Touching):
        def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
            features = cut(self.encode_images(torch.cat(list(images))))
            return torch.cat([self.get_2dPool(f) for f in features])

    stock, fused = touching(kind=Cutting)
    assert_equal(stock, fused)
    assert products == []


def test_only_what_is_not_pooled_is_computed(products):
    _, fused = touching()
    fused(torch.randn(6, 49, 8).double().split([2, 3, 1]), ["image", "video", "image"])
    assert products == [(2, 49, 8 + 4), (1, 49, 12)]


@pytest.mark.parametrize("named", [{"stride": 3}, {}], ids=["stride", "default"])
def test_tokens_under_the_name_that_the_method_gives_them(products, named):
    class Naming(Touching):
        def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
            return self.get_2dPool(**named, image_feature=self.encode_images(torch.cat(images)))

    assert_equal(*touching(kind=Naming))
    assert products == []


def unfinished(projector=None):
    """A projector's output, of a model in no mode."""
    seen = []
    _, fused = touching(projector, touch=lambda f: seen.append(f) or f)
    with torch.no_grad():
        fused(torch.randn(6, 49, 8).double().split(3), ["video"] * 2)
    assert type(seen[0]) is Unfinished
    return seen[0]


WRITES = {
    "method": lambda f: f.mul_(2),
    "operator": lambda f: f.__imul__(2),
    "item": lambda f: f.__setitem__(0, 1.0),
    "data": lambda f: setattr(f, "data", torch.zeros(1)),
    "out": lambda f: torch.add(1, torch.ones(f.shape).double(), out=f),
    "function": lambda f: nn.functional.relu_(f),
    "foreach": lambda f: torch._foreach_mul_([f], 2),
}


@pytest.mark.parametrize("mode", [nullcontext, torch.inference_mode])
@pytest.mark.parametrize("write", WRITES.values(), ids=[*WRITES])
def test_parts_and_whole_are_not_changed_in_place(write, mode):
    with mode():
        for choose in (
            lambda f, parts: f,
            lambda f, parts: parts[0],
            lambda f, parts: parts[1].split(1)[0],
            lambda f, parts: f[:2][:1],
        ):
            f = unfinished()
            parts = f.split(2)
            with pytest.raises(RuntimeError, match=r"clone\(\) it"):
                write(choose(f, parts))
            write(choose(f, parts).clone())
            write(unfinished())
        parts = unfinished().split(2)  # nobody else has the whole
        write(parts[0])


@pytest.mark.parametrize("look", [lambda f: f + 1, lambda f: f.split(1), torch.clone])
def test_parts_changed_in_place_behind_our_back(look):
    f = unfinished()
    part = f[:2]
    part[0].mul_(2)
    with pytest.raises(RuntimeError, match=r"clone\(\) it"):
        look(f)


def test_functions_that_write_without_saying_so():
    f = unfinished()
    part = f[:2]
    with pytest.raises(RuntimeError, match=r"clone\(\) it"):
        nn.functional.relu(part, True)


def test_input_changed_in_place():
    def encode(projector, images):
        f = projector(images)
        images.zero_()
        return f

    _, fused = touching(nn.Linear(8, 12), encode=encode)
    with pytest.raises(RuntimeError, match="the projector's input was changed in place"):
        fused([torch.randn(6, 49, 8).double()], ["video"])


def test_changed_in_place_by_a_function_past_python():
    f = unfinished()
    want = f.clone() * 2
    assert torch.vmap(lambda x: x.mul_(2))(f) is not None
    torch.testing.assert_close(f + 0, want)
    with torch._C.DisableTorchFunctionSubclass():
        assert f.mul_(2) is f
    torch.testing.assert_close(f + 0, 2 * want)
    f = unfinished()
    part = f[:2]
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="clone"):
        part.mul_(2)


def test_in_place_results_are_the_same_object():
    f = unfinished()
    before = f
    f += 1
    assert f is before
    assert f.mul_(2) is f


CONTAINERS = {
    "dict": lambda f: {"features": f, "count": 1},
    "named tuple": lambda f: Named(f, 1),
    "ordered": lambda f: collections.OrderedDict(a=[f]),
    "nested": lambda f: [[{"a": (f,)}], 1],
}


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=[*CONTAINERS])
def test_what_a_model_returns_holds_tensors(contain):
    class Containing(Touching):
        def prepare_inputs_labels_for_multimodal(self, images, modalities=("image",)):
            return contain(self.encode_images(images)), self.config_like

    stock, fused = touching(kind=Containing)
    stock.config_like = fused.config_like = {"other": [1, 2]}
    x = torch.randn(6, 49, 8).double()
    (got, same), (want, _) = fused(x), stock(x)
    assert same is fused.config_like
    assert type(got) is type(want)
    leaves = torch.utils._pytree.tree_leaves(got)
    assert [type(leaf) for leaf in leaves] == [
        type(leaf) for leaf in torch.utils._pytree.tree_leaves(want)
    ]
    torch.testing.assert_close(got, want)


def loaded(f):
    file = io.BytesIO()
    torch.save(f, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    "keep",
    [loaded, copy.deepcopy, copy.copy, lambda f: pickle.loads(pickle.dumps(f))],
    ids=["save", "deepcopy", "copy", "pickle"],
)
def test_what_a_model_stored_is_a_tensor(keep):
    f = unfinished()
    f.foo = "features"
    copied = keep(f)
    assert type(copied) is torch.Tensor
    assert copied.foo == f.foo
    assert torch.equal(copied, f.detach())
    assert isinstance(f, torch.Tensor)
    torch.testing.assert_close(torch.tensor(f.tolist()).double(), copied)
