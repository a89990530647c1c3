"""Would the `gpu` tests run on a GPU? On a CPU that refuses what CUDA does: machines/gpu.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: they run on it")
def test_every_test_for_a_gpu_runs_where_cuda_refuses():
    """All of them, also the slow ones, and none warns; but for the kernels' own edges.

    There eager's operators, which stand for the kernels, differ from them.
    """
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", str(TESTS), "-q", "--tb=short"),
            *("-p", "machines.gpu", "-m", "gpu", "-p", "no:cacheprovider"),
            *("--ignore", str(TESTS / "kernels" / "test_edges.py")),
        ],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout
    summary = run.stdout.splitlines()[-1]
    assert int(re.search(r"(\d+) passed", summary)[1]) >= 80
    assert "warning" not in summary, run.stdout
