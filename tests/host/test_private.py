"""Does a private name that torch lacks cost its feature, with the reason, and nothing else?"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deco_kernels import FusedAvgPoolProjector
from deco_kernels.host import private

PATHS = [(feature, path) for feature, needs in private.FEATURES.items() for path in needs.names]


@pytest.mark.parametrize(("feature", "path"), PATHS)
def test_this_torch_has_it(feature, path):
    assert private._find(path) is not None
    assert private.lacks(feature) is None


def test_constants_of_graphs_are_marked_as_torch_marks_them():
    def ours():
        pass

    def torchs():
        pass

    private.constant_in_graphs(ours)
    torch.compiler.assume_constant_result(torchs)
    assert vars(ours) == vars(torchs) != {}


# Those of classes in C, and of instances, cannot be deleted.
DELETED = {
    feature: [path for path in needs.names if "Tensor." not in path and "()" not in path]
    for feature, needs in private.FEATURES.items()
}
# Without these torch itself calls no module, or no Function.
OF_TORCH = "global hooks", "transforms"
WITHOUT = """
import json, sys, torch
import torch._dynamo, torch._subclasses.schema_check_mode  # torch's own have what they need
sys.path.insert(0, {tests!r})
for path in {paths!r}:
    *owner, name = path.split(".")[1:]
    found = torch
    for part in owner:
        found = getattr(found, part)
    delattr(found, name)

import deco_kernels
from deco_kernels.integrations import explain
from stock import LlavaLike
model, same = (
    torch.nn.ModuleList([LlavaLike(), deco_kernels.AvgPoolProjector(2, 4, 8, 8)]) for _ in range(2)
)
same.load_state_dict(model.state_dict())
deco_kernels.fuse(model)
if {runs}:
    x = torch.randn(2, 16, 8)
    assert torch.allclose(model[1](x), same[1](x), atol=1e-6)
    x = torch.randn(2, 49, 8)
    assert torch.allclose(model[0]([x], ["video"]), same[0]([x], ["video"]), atol=1e-6)
plans = explain(model) | {{"alone": deco_kernels.FusedAvgPoolProjector(2, 4, 8, 8).explain()}}
print(json.dumps({{name: [plan.path, plan.reason] for name, plan in plans.items()}}))
"""


@pytest.mark.parametrize("own", [True, False], ids=["torch uses them", "only we use them"])
def test_without_it_the_package_works_and_says_what_does_not(own):
    features = [feature for feature, paths in DELETED.items() if (feature in OF_TORCH) == own]
    deleted = [path for feature in features for path in DELETED[feature]]
    tests = str(Path(__file__).parents[1])
    code = WITHOUT.format(paths=deleted, runs=not own, tests=tests)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    plans = json.loads(run.stdout)
    for feature in filter(DELETED.get, features):
        told = f"has no {', '.join(DELETED[feature])}: {private.FEATURES[feature].without}"
        assert all(told in reason for _, reason in plans.values())
    paths = {name: path for name, (path, _) in plans.items()}
    if own:
        assert paths == {"alone": "modules"}  # fuse has left the others
    else:
        assert paths == {"0": "stock", "1": "fused", "alone": "fused"}


def test_a_module_whose_hooks_cannot_be_seen_is_called():
    """As it would be if torch kept them elsewhere."""
    projector = FusedAvgPoolProjector(2, 4, 8, 8)
    assert projector.explain().path == "fused"
    del projector.mlp_projector[0].__dict__["_forward_hooks"]
    assert projector.explain().path == "pooled"
