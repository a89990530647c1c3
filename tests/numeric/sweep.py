"""Do the numeric tests depend on chance? They run with other seeds, as on other machines.

``python tests/numeric/sweep.py [--seeds 20] [--quick]``

The order in which a BLAS or a reduction sums is another processor's, or another number of threads':
settings of MKL and ATen stand for those, each with a process of its own. There all numeric tests
run once for every seed, where computing is fast: torch's operators, and the CUDA C++ kernels
compiled for the CPU. What is slow, Triton's interpreter and the simulated PTX, runs under the first
three settings, with the first seed. ``--quick`` is those three settings and two seeds, without what
is slow; ``.ci/run`` calls it.

Prints how many tests failed, a line a setting and a column a seed. Exit code 1 if any did.
"""

import argparse
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

TESTS = Path(__file__).parents[1]
SEED = "DECO_KERNELS_TESTS_SEED"
SETTINGS = (
    {"MKL_CBWR": "COMPATIBLE"},
    {"ATEN_CPU_CAPABILITY": "default"},
    {"OMP_NUM_THREADS": "2"},
    {"OMP_NUM_THREADS": "1"},
    {"MKL_CBWR": "AVX2"},
    {"MKL_CBWR": "AVX512"},
    {"ATEN_CPU_CAPABILITY": "avx2"},
    {},
)
QUICK = SETTINGS[:3]
FAST = "not interpreter and not sm75 and not sm80 and not sm90 and not in_triton"


class Count:
    """A plugin: how many tests passed, and which failed."""

    def __init__(self) -> None:
        self.passed, self.failed = 0, []

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)
        self.passed += report.when == "call" and report.passed


def run_here(seeds: list[int], slow: bool) -> None:
    """A line a seed: passed, and the names of those that failed."""
    import pytest

    for seed in seeds:
        os.environ[SEED], count = str(seed), Count()
        chosen = () if slow and seed == seeds[0] else ("-k", FAST)
        quiet = "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "ignore"
        with redirect_stdout(sys.stderr):
            pytest.main([str(TESTS), "-m", "numeric and not slow", *chosen, *quiet], [count])
        print(count.passed, *count.failed, sep="\t", flush=True)


def run(setting: dict[str, str], seeds: list[int], slow: bool) -> list[list[str]]:
    """What failed, for each seed."""
    names = {name for each in SETTINGS for name in each}
    environment = {k: v for k, v in os.environ.items() if k not in names} | setting
    command = [sys.executable, __file__, "--here", *map(str, seeds), *["--slow"] * slow]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    if len(lines) != len(seeds) or not all(int(passed) for passed, *_ in lines):
        raise SystemExit(f"{setting}: {done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return [failed for _, *failed in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, help="how many, from 1; default: 20, or 2 if quick")
    parser.add_argument("--quick", action="store_true", help="three settings, nothing slow")
    parser.add_argument("--here", type=int, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--slow", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        run_here(options.here, options.slow)
        return 0
    seeds = [*range(1, 1 + (options.seeds or (2 if options.quick else 20)))]
    settings = QUICK if options.quick else SETTINGS
    print(f"{'failed tests with seed':32}", *(f"{seed:3}" for seed in seeds))
    bad = {}
    for setting in settings:
        name = " ".join(f"{k}={v}" for k, v in setting.items()) or "as it is"
        begun = time.monotonic()
        failed = run(setting, seeds, slow=setting in QUICK and not options.quick)
        counts = (f"{len(each):3}" for each in failed)
        print(f"{name:32}", *counts, f"  {time.monotonic() - begun:.0f} s", flush=True)
        for seed, each in zip(seeds, failed, strict=True):
            for test in each:
                bad.setdefault(test, []).append(f"{name}, seed {seed}")
    for test, where in bad.items():
        print(f"{test}\n    {'; '.join(where)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
