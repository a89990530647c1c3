"""Every test computes deterministically, with fresh memory full of NaN."""

import importlib.util
import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
# Without it cuBLAS refuses to compute deterministically. Read when a process first uses cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


from machines.every import machine  # noqa: F401  a fixture
from numeric import seeds

hypothesis.settings.register_profile("the same examples twice", derandomize=True)
hypothesis.settings.load_profile("the same examples twice")


# What asks of Triton's kernels only.
collect_ignore = [
    "kernels/test_compile.py",
    "kernels/test_edges.py",
    "kernels/test_far_strides.py",
    "tuning/test_model.py",
    "kernels/test_races.py",
    "kernels/test_specialisations.py",
    "tools/test_table.py",
    "kernels/test_traffic.py",
]
if importlib.util.find_spec("triton") is not None:
    collect_ignore = []


def pytest_report_header():
    if collect_ignore:
        return f"Triton is not installed, so these are left out: {', '.join(collect_ignore)}"


@pytest.fixture
def jit():
    """What compiles the Triton kernels ahead of time."""
    return pytest.importorskip(
        "deco_kernels.tools.compile.triton", reason="Triton is not installed"
    )


@pytest.fixture(autouse=True)
def poisoned_memory(request):
    """Deterministic algorithms make torch fill new memory with NaN: nobody may read it.

    On a GPU torch's own pooling, which we compare with, has none for its backward: there it must
    not raise, and that it would warn is no news (see pyproject.toml).
    """
    on_gpu = request.node.get_closest_marker("gpu") is not None
    torch.use_deterministic_algorithms(True, warn_only=on_gpu)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(seeds()[0])
