"""Every test computes deterministically, with fresh memory full of NaN."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic algorithms make torch fill new memory with NaN: nobody may read it."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)
