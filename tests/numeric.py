"""What the numeric tests share: their seeds, and how functions are compared as modules are.

They give the same answer twice: every random number follows from ``DECO_KERNELS_TESTS_SEED``, 0 if
it is not set. ``tests/numeric_sweep.py`` sets it to others.
"""

import os

import pytest
import torch

from deco_kernels.tools.check import SLACK, Error

SEED = "DECO_KERNELS_TESTS_SEED"
numeric = pytest.mark.numeric


def seeds(n: int = 8) -> range:
    first = 1000 * int(os.environ.get(SEED, "0"))
    return range(first, first + n)


def wrong(found: list[Error], slack: float = SLACK) -> list[str]:
    """What is not within its bars, and how far."""
    return [
        f"{e.name}: {e.ours / e.bar(slack):.2f} of the bar, largest {e.largest:.2f}"
        for e in found
        if not e.within(slack)
    ]


class Function(torch.nn.Module):
    """``compute(x, *parameters)`` as a module."""

    def __init__(self, compute, **parameters) -> None:
        super().__init__()
        self.compute = compute
        for name, t in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(t.detach()))

    def forward(self, x):
        return self.compute(x, *self.parameters())
