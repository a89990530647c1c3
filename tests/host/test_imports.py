"""Is a module told what it must know when others import it, once and not before?"""

import importlib
import importlib.util
import subprocess
import sys

import pytest

from deco_kernels.host.imports import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "imported_later.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    yield "imported_later"
    sys.modules.pop("imported_later", None)


def test_it_is_told_once_when_it_is_there(module):
    told, finders = [], [*sys.meta_path]
    when_imported(module, lambda found: told.append(found.value))
    assert importlib.util.find_spec(module) is not None  # who only looks
    assert told == []
    importlib.import_module(module)
    assert told == [1]
    assert sys.meta_path == finders


def test_of_one_that_is_there_already_it_is_told_at_once(module):
    found, told = importlib.import_module(module), []
    when_imported(module, told.append)
    assert told == [found]


def test_two_may_wait_and_one_that_cannot_be_imported_is_nobodys_matter(module):
    told = []
    when_imported(module, lambda found: told.append("first"))
    when_imported(module, lambda found: told.append("second"))
    when_imported("there_is_no_such_module", told.append)
    importlib.import_module(module)
    assert sorted(told) == ["first", "second"]
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("there_is_no_such_module")


FLOPS = """
import torch
{first}
{second}
from torch.utils.flop_counter import FlopCounterMode
projector = deco_kernels.FusedAvgPoolProjector(1, 4, 8, 16)
with FlopCounterMode(display=False) as counter:
    stencil = deco_kernels.Stencil.adaptive((4, 4), (2, 2))
    x, w = torch.randn(3, 16, 8), torch.randn(16, 8)
    places = stencil.places(x.device, x.dtype)
    torch.ops.deco_kernels.pool_linear(x, *places, w, None, None, None, True, None, "eager")
print(counter.get_total_flops())
"""


@pytest.mark.parametrize("order", [0, 1])
def test_flops_are_counted_whoever_is_imported_first(order):
    imports = ["import deco_kernels", "import torch.utils.flop_counter"]
    first, second = imports[::-1] if order else imports
    code = FLOPS.format(first=first, second=second)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == f"{2 * 3 * 4 * 8 * 16}\n", run.stderr
