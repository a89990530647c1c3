"""What is run here, how long may it take, and why is the rest not?"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import join

PACKAGES = {"pytest": "pytest", "pytest_benchmark": "pytest-benchmark", "numpy": "numpy"}
NO_GPU = "no CUDA device"
CHECKOUT = "here; run from a checkout"

# On a GPU: shapes that fill it and do not take minutes. max-autotune would, for each of them.
GPU_SHAPES = "llava-576-144-b64", "llava-576-144-b8", "gemma3-4096-256-b8", "siglip-729-196-b8"
GPU_SELECTED = "(forward or step-frozen) and not max-autotune"
GPU_MEMORY = "not compile or (llava-576-144 and step-frozen and not max-autotune)"
CPU_SHAPES = {"llava-576-144": 80, "llava-576-64": 60, "gemma3": 60, "siglip": 80, "video": 60}
CPU_ONLY = "on a GPU the fused kernels are what matters: pytest benchmarks/test_{}.py"

# --color=no: in a file. The cache would write into the checkout.
_QUIET = ("-q", "-rs", "--color=no", "-p", "no:cacheprovider")
_COLUMNS = ("--benchmark-columns", "min,median,max,rounds")


@dataclass(frozen=True)
class Step:
    """One command of ours, ``python -m`` and then ``command``; not run if there is a ``reason``.

    ``{scratch}`` in the command is a folder for the files that it writes for us. ``limit`` is in
    seconds; what earlier steps left of theirs comes on top.
    """

    name: str
    title: str
    command: tuple[str, ...]
    limit: int
    reason: str | None = None

    @property
    def log(self) -> str:
        """The file of its output, in the report's folder."""
        return f"{self.name}.txt"

    def __str__(self) -> str:
        """The command without what only concerns the looks of its output."""
        words = [word for word in self.command if word not in (*_QUIET, *_COLUMNS)]
        return f"python -m {join(word.replace('{scratch}/', '') for word in words)}"


def checkout() -> Path | None:
    """The folder with tests/ and benchmarks/: the package's, else the current one; or None."""
    ours = "tests/tuning/test_model.py", "benchmarks/test_speed.py"  # others have such folders too
    roots = Path(__file__).resolve().parents[3], Path.cwd()
    return next((root for root in roots if all((root / file).is_file() for file in ours)), None)


def missing(packages: dict[str, str]) -> str | None:
    """What to install, of ``packages``: names to import, and names for pip."""
    names = [pip for name, pip in packages.items() if importlib.util.find_spec(name) is None]
    return f'{", ".join(names)} missing: pip install ".[report]"' if names else None


def plan(on_gpu: bool) -> list[Step]:
    """Every step, in order. The limits add up to less than 10 minutes on a GPU, 15 on a CPU."""
    no_gpu = None if on_gpu else NO_GPU
    tests = _not_here("tests")
    own = "deco_kernels"
    counted = ("tests/tuning/test_model.py", "tests/kernels/test_traffic.py")
    title = "Tune: not measured here, this is the plan"
    tune = Step("tune", title, (own, "tune", "--dry-run"), 30)
    if on_gpu:
        tune = Step("tune", "Tune", (own, "tune"), 90)
    plain = [
        Step("info", "Machine", (own, "info"), 15),
        Step("check", "Right or wrong", (own, "check"), 50),
        Step(
            "gpu_tests",
            "Tests on the GPU",
            ("pytest", "tests", "-m", "gpu and not slow", *_QUIET),
            150,
            no_gpu or tests,
        ),
        Step(
            "counts",
            "Counted without a GPU",
            ("pytest", *counted, *_QUIET, "--junit-xml", "{scratch}/counts.xml"),
            150,
            "it needs no GPU: see benchmarks/results/cpu" if on_gpu else tests,
        ),
        tune,
    ]
    predicted = Step("predict", "Predicted", (own, "predict"), 15)
    return [*plain, *_benchmarks(on_gpu), predicted]


def _not_here(folder: str) -> str | None:
    if checkout() is None:
        return f"no {folder}/ {CHECKOUT}"
    return missing(PACKAGES)


def _benchmarks(on_gpu: bool) -> list[Step]:
    """In pieces: pytest-benchmark writes its file at the end, so a crash loses one piece only."""
    if on_gpu:
        speed = [(shape, f"{shape} and {GPU_SELECTED}", 45) for shape in GPU_SHAPES]
        others = [
            ("memory", GPU_MEMORY, 40),
            ("projector", "", 20),
            ("fuse", "", 0),
            ("packed", "", 0),
        ]
    else:
        speed = [(shape, shape, limit) for shape, limit in CPU_SHAPES.items()]
        others = [("memory", "", 60), ("projector", "", 40), ("fuse", "", 120), ("packed", "", 60)]
    steps = [_benchmark(name, name, *rest) for name, *rest in others]
    if on_gpu:
        only = (
            replace(each, reason=each.reason or CPU_ONLY.format(each.name)) for each in steps[2:]
        )
        steps[2:] = only
    steps += [_benchmark(f"speed_{name}", f"speed, {name}", *rest) for name, *rest in speed]
    return steps


def _benchmark(name: str, title: str, keyword: str, limit: int) -> Step:
    file = f"benchmarks/test_{name.partition('_')[0]}.py"
    selected: Sequence[str] = ("-k", keyword) if keyword else ()
    name = name.replace("-", "_")
    table = ("--benchmark-only", *_COLUMNS)
    return Step(
        name,
        f"Benchmarks: {title}",
        (
            "pytest",
            file,
            *selected,
            *table,
            *_QUIET,
            "--benchmark-json",
            f"{{scratch}}/{name}.json",
        ),
        limit,
        _not_here("benchmarks"),
    )
