"""In which calls does a fused module run its original code?"""

import copy

import pytest
import torch
from stock import PerceptionProjector, RatioPooling, SeedProjector
from stock.kinds import KINDS, computes

from deco_kernels import AvgPoolProjector, fuse
from deco_kernels.integrations import explain


class Deco(AvgPoolProjector):
    def __init__(self):
        super().__init__(2, 4, 8, 12)


BASES = pytest.mark.parametrize("base", [Deco, SeedProjector, PerceptionProjector])


def fused_pair(kind):
    stock = kind()
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    return stock, fused


def of(base):
    """Forwards of a projector ``base`` that take more than tokens."""

    class Scaled(base):
        def forward(self, image_features, size=None):
            if image_features.dim() == 4:
                return torch.stack([self.forward(frames) for frames in image_features])
            y = super().forward(image_features.to(self.dtype()))
            return y if size is None else y * size[0] / size[1]

        def dtype(self):
            return next(self.parameters()).dtype

    return Scaled


CALLS = {
    "by name": lambda m, x: m(image_features=x),
    "more by position": lambda m, x: m(x, (3, 12)),
    "more by name": lambda m, x: m(x, size=(1, 4)),
    "frames": lambda m, x: m(torch.stack([x, -x])),
    "another dtype": lambda m, x: m(x.double()),
}


@BASES
@pytest.mark.parametrize("call", CALLS.values(), ids=[*CALLS])
def test_a_call_with_other_arguments(base, call):
    stock, fused = fused_pair(of(base))
    x = torch.randn(3, 36, 8)
    torch.testing.assert_close(call(fused, x), call(stock, x))


@BASES
def test_tokens_by_name_are_fused(base):
    _, fused = fused_pair(of(base))
    x = torch.randn(3, 36, 8)
    for call in (lambda m, x: m(x), lambda m, x: m(image_features=x)):
        assert computes(fused, KINDS["seed"]._replace(call=call), x)


@BASES
def test_errors_are_those_of_the_original_code(base):
    stock, fused = fused_pair(base)
    x = torch.randn(2, 36, 8)
    for arguments, more in (
        ((), {}),
        ((x, None), {}),
        ((), {"tokens": x}),
        ((x[:, :-1],), {}),
        ((x[..., :-1],), {}),
        ((x.int(),), {}),
        (("x",), {}),
        ((x[:, :0],), {}),
    ):
        raised = []
        for module in (stock, fused):
            with pytest.raises(Exception) as caught:  # noqa: PT011
                module(*arguments, **more)
            raised.append((caught.type, str(caught.value)))
        assert raised[0] == raised[1]


@BASES
def test_names_of_the_projector_are_its_own(base):
    class Named(base):
        def __init__(self):
            super().__init__()
            self.backend, self._side, self.mm_hidden_size = "sdpa", "left", None

        def _check(self, x):
            return x

        def explain(self):
            return "mine"

        def forward(self, x):
            return super().forward(self._check(x))

    _, fused = fused_pair(Named)
    assert (fused.backend, fused._side, fused.mm_hidden_size) == ("sdpa", "left", None)
    assert fused.explain() == "mine"
    x = torch.randn(2, 36, 8)
    assert fused._check(x) is x
    fused.backend = "other"
    assert fused.backend == "other"


@BASES
def test_a_changed_attribute(base):
    class Scaled(base):
        offset = 0

        def __init__(self):
            super().__init__()
            self.scale, self.name, self.limit = 1.0, "a", None

        def forward(self, x):
            y = super().forward(x) * self.scale + self.offset
            return y if self.name == "a" and self.limit is None else -y

    x = torch.randn(2, 36, 8)
    for name, value in {"scale": 3.0, "name": "b", "limit": 5, "offset": 2}.items():
        stock, fused = fused_pair(Scaled)
        before = getattr(fused, name)
        for module in (stock, fused):
            setattr(module, name, value)
        assert torch.equal(fused(x), stock(x))
        assert explain(fused)[""].path == "stock"
        assert explain(fused)[""].reason == f"{name} is {value!r} now"
        setattr(fused, name, before)
        assert explain(fused)[""].path == "fused"


def test_what_every_module_has_may_change():
    _, fused = fused_pair(PerceptionProjector)
    fused.eval().register_full_backward_hook(lambda *_: None)
    fused.another = 1
    assert explain(fused)[""].path == "fused"


def test_a_changed_attribute_of_the_pooling():
    class Scaled(RatioPooling):
        scale = 1.0

        def forward(self, x):
            return super().forward(x) * self.scale

    stock = PerceptionProjector()
    stock.pooling = Scaled(2)
    fused = copy.deepcopy(stock)
    assert [*fuse(fused).replaced] == [""]
    for module in (stock, fused):
        module.pooling.scale = 3.0
    x = torch.randn(2, 36, 8)
    assert torch.equal(fused(x), stock(x))
    assert explain(fused)[""].reason == "scale is 3.0 now"


@pytest.mark.parametrize("name", ["seed", "perception"])
def test_a_hooked_layer_brings_the_original_code_back(name):
    calls = []

    class Counting(type(KINDS[name].make())):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    _, fused = fused_pair(Counting)
    calls.clear()
    x = torch.randn(KINDS[name].shape)
    fused(x)
    assert not calls
    fused.get_submodule(KINDS[name].last).register_forward_hook(lambda *_: None)
    fused(x)
    assert calls == [len(x)]
