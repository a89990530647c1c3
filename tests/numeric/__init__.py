"""What the numeric tests share: their seeds, and how functions are compared as modules are.

They give the same answer twice: every random number follows from ``DECO_KERNELS_TESTS_SEED``, 0 if
it is not set. ``tests/numeric/sweep.py`` sets it to others.
"""

import os

import pytest
import torch

from deco_kernels.tools.check import SLACK, Case, Error

SEED = "DECO_KERNELS_TESTS_SEED"
numeric = pytest.mark.numeric

# Ragged rows, features and channels; three or more steps of the pipelined loops.
CASES = {
    "overlapping": Case(15, 7, 9, 200, 136, layer_num=2, strided=True),
    "regular": Case(4, 12, 36, 192, 128, layer_num=2),
    "unaligned": Case(3, 6, 4, 67, 45, layer_num=1),
    "upsampling": Case(2, 3, 25, 72, 80, layer_num=3, strided=True),
    "global": Case(3, 9, 1, 136, 64, layer_num=2),
}


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
