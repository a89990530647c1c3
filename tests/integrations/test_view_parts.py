"""When is an output computed that is not pooled, who may change it, and who gets it?"""

import collections
import copy
import io
import pickle
from contextlib import nullcontext

import pytest
import torch
from stock.touching import Touching, assert_equal, touching
from torch import nn

from deco_kernels.integrations.tail import Tail
from deco_kernels.integrations.unfinished import Unfinished

Named = collections.namedtuple("Named", "features count")


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
