"""Is importing the package next to nothing beside importing torch?"""

import json
import subprocess
import sys

# Slow to import, or not what a user of the library asked for.
HEAVY = (
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.flop_counter",
    "torch.utils.cpp_extension",
    "sympy",
    "filelock",
    "tqdm",
    "numpy",
    "matplotlib",
    "deco_kernels.tools",
)
CALL = """
import json, sys, torch
before = set(sys.modules)
import deco_kernels
loaded = set(sys.modules) - before
{then}
print(json.dumps([sorted(loaded), torch.cuda.is_initialized()]))
"""
ON_A_CPU = """
projector = deco_kernels.FusedAvgPoolProjector(2, 4, 8, 8)
projector(torch.randn(1, 16, 8)).sum().backward()
deco_kernels.fuse(torch.nn.Sequential(projector))
loaded = set(sys.modules) - before
"""


def loaded_by(then=""):
    command = [sys.executable, "-c", CALL.format(then=then)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_loads_nothing_heavy_and_touches_no_gpu():
    loaded, cuda = loaded_by()
    assert not set(loaded) & set(HEAVY)
    assert not [name for name in loaded if name.startswith(("triton", "deco_kernels.tools"))]
    assert not cuda


def test_neither_does_a_training_step_on_a_cpu():
    loaded, cuda = loaded_by(ON_A_CPU)
    assert not set(loaded) & {"triton", "filelock", "tqdm", "deco_kernels.tools"}
    assert not cuda
