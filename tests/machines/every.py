"""All the machines that kernels run on, as a fixture of all tests."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
from numeric import seeds

from deco_kernels import backends
from machines.cuda import on_host, on_ptx, require_compilers
from machines.triton import INTERPRETING, simulated

MACHINES = [
    ("triton", "interpreter"),
    ("triton", "sm80"),
    pytest.param(("triton", "sm90"), marks=pytest.mark.slow),  # test_races.py has it too
    pytest.param(("triton", "gpu"), marks=pytest.mark.gpu),
    ("composed", "interpreter"),
    pytest.param(("composed", "sm80"), marks=pytest.mark.slow),
    pytest.param(("composed", "gpu"), marks=pytest.mark.gpu),
    ("cuda", "host"),
    ("cuda", "sm80"),
    pytest.param(("cuda", "sm75"), marks=pytest.mark.slow),
    pytest.param(("cuda", "sm90"), marks=pytest.mark.slow),  # nvcc's PTX differs little
    pytest.param(("cuda", "gpu"), marks=pytest.mark.gpu),
]


@dataclass
class Machine:
    """Where kernels run; ``context`` yields the statistics of what is launched in it."""

    backend: str
    name: str

    @property
    def device(self):
        return "cuda:0" if self.name == "gpu" else "cpu"

    @property
    def seeds(self):
        """Simulators take seconds a run: there the elements of one are the sample."""
        return seeds(8 if self.name in ("host", "gpu") else 1)

    def skip_without(self, dtype):
        """On a GPU that lacks what these kernels need in this dtype."""
        if self.name == "gpu":
            reason = backends.unusable(self.backend, torch.device(self.device), dtype)
            if reason:
                pytest.skip(reason)

    def context(self):
        if self.name in ("interpreter", "gpu"):
            return nullcontext([])
        if self.name == "host":
            return on_host(seed=3, resident=2)
        run = on_ptx if self.backend == "cuda" else simulated
        return run(int(self.name[2:]))


@pytest.fixture(params=MACHINES, ids=lambda machine: "-".join(machine))
def machine(request):
    backend, name = request.param
    if (name == "interpreter") != INTERPRETING:
        pytest.skip("Triton decides on import: see kernels/test_kernels.py")
    if name == "gpu" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if backend == "cuda" and name != "gpu":
        require_compilers(ptx=name != "host")
    machine = Machine(backend, name)
    machine.skip_without(torch.float16)
    return machine
