"""Who is fastest on this GPU? Measures every backend's verbs, and keeps the times for "auto"."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..backends import BACKENDS, get, unusable
from ..stencil import Stencil, Table
from ..stencil.numbers import check_count, check_grid, square_side
from ..tuning import cache
from ..tuning.call import Call
from ..tuning.decide import remember
from .measure import float32_matmul, seconds

HELP = "measure every backend on this GPU, for backend auto to use"
CANDIDATES = tuple(backend for backend in BACKENDS if backend != "auto")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
WARMUP, ROUNDS = 3, 20


class Job(NamedTuple):
    """A verb to measure: how "auto" will look it up, and tensors of these sizes."""

    call: Call
    tokens: tuple[int, int, int]  # [B, n_in, K]; for dact_linear [1, M, K]
    table: Table | None

    def describe(self) -> str:
        pooled = f", pooled to {len(self.table.index)}" if self.table else ""
        return f"{self.call.verb} {[*self.tokens]}{pooled} -> {self.call.features}"


def plan(
    grid: tuple[int, int],
    query_num: int,
    mm_hidden_size: int,
    llm_hidden_size: int,
    layer_num: int,
    batch: Iterable[int],
    dtype: torch.dtype,
) -> list[Job]:
    """The verbs of a projector's training step that have more than one way to be computed."""
    stencil = Stencil.adaptive(grid, (square_side("query_num", query_num),) * 2)
    table = stencil.tables("cpu", torch.float32)[0]
    jobs: dict[Call, Job] = {}
    for images in sorted(batch):  # of a bucket, the largest is measured
        tokens, m = (images, stencil.n_in, mm_hidden_size), images * stencil.n_out
        w = llm_hidden_size, mm_hidden_size
        call = Call.pool_linear(tokens, table.index.shape, w, dtype, layer_num > 1).bucket()
        jobs[call] = Job(call, tokens, table)
        if layer_num > 1:
            call = Call.dact_linear(m, (llm_hidden_size,) * 2, dtype).bucket()
            jobs[call] = Job(call, (1, m, llm_hidden_size), None)
    return list(jobs.values())


def _work(job: Job, device: torch.device) -> Callable[[str], object]:
    """Random tensors, and the call that a backend is timed with."""
    (batch, rows, channels), (call, _, table) = job.tokens, job

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=call.dtype, device=device)

    x = randn(batch, rows, channels)
    if table is None:
        dy, w, z = x[0], randn(channels, call.features), randn(rows, call.features)
        return lambda backend: get(backend).dact_linear(dy, w, z, True, True)
    w, bias = randn(call.features, channels), randn(call.features)
    placed = table.to(device, torch.float32)
    activation = "gelu" if call.activation else None
    return lambda backend: get(backend).pool_linear(x, placed, w, bias, activation, True)


def measure(
    job: Job, candidates: Sequence[str], device: torch.device, progress: Callable[[], object]
) -> dict[str, float]:
    """Median microseconds of each candidate, timed round by round in turns."""
    work = _work(job, device)
    times: dict[str, list[float]] = {backend: [] for backend in candidates}
    for i in range(WARMUP + ROUNDS):
        for j in range(len(candidates)):
            backend = candidates[(i + j) % len(candidates)]
            took = seconds(lambda b=backend: work(b), device)
            times[backend] += [took] if i >= WARMUP else []
        progress()
    return {backend: 1e6 * statistics.median(found) for backend, found in times.items()}


def arguments(parser: argparse.ArgumentParser) -> None:
    text = "patch tokens of an image; default: 24 24"
    parser.add_argument("--grid", type=int, nargs=2, metavar=("H", "W"), help=text)
    for name, default in (
        ("query_num", 144),
        ("mm_hidden_size", 1024),
        ("llm_hidden_size", 4096),
        ("layer_num", 2),
    ):
        text = f"of the projector; default: {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help=text)
    text = "images in a step; default: 1 8 64"
    parser.add_argument("--batch", type=int, nargs="+", metavar="B", help=text)
    parser.add_argument("--dtype", choices=DTYPES)
    parser.add_argument("--device", help="default: cuda:0")
    parser.add_argument("--dry-run", action="store_true", help="print what would be measured")


def main(**options: Any) -> int:
    run(**options)
    return 0


def run(
    grid: tuple[int, int] = (24, 24),
    query_num: int = 144,
    mm_hidden_size: int = 1024,
    llm_hidden_size: int = 4096,
    layer_num: int = 2,
    batch: Sequence[int] = (1, 8, 64),
    dtype: str = "bfloat16",
    device: str = "cuda:0",
    dry_run: bool = False,
) -> None:
    """Measure a projector's verbs on a GPU and store the times; prints a table.

    Args:
        grid: (h, w) of an image's patch tokens.
        query_num, mm_hidden_size, llm_hidden_size, layer_num: as ``AvgPoolProjector``.
        batch: images (or frames) of a step; one measurement for each power of two of rows.
        dtype: "bfloat16", "float16" or "tf32".
        dry_run: print what would be measured, and measure nothing.

    Raises:
        TypeError, ValueError: a size is not a positive integer, or no such dtype.
        RuntimeError: no such GPU, or none of our kernels can run on it.
        OSError: the times could not be written; comes before anything is measured.
    """
    for name, size in (
        ("mm_hidden_size", mm_hidden_size),
        ("llm_hidden_size", llm_hidden_size),
        ("layer_num", layer_num),
        ("query_num", query_num),
        *(("batch", images) for images in batch),
    ):
        check_count(name, size)
    if not batch:
        raise ValueError("batch must name at least one number of images")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    sizes = check_grid("grid", grid), query_num, mm_hidden_size, llm_hidden_size, layer_num
    jobs = plan(*sizes, batch, DTYPES[dtype])
    if dry_run:
        _print_plan(jobs, dtype)
        return
    place = _gpu(device)
    cache.check_folder()
    candidates = []
    for backend in CANDIDATES:
        problem = _problem(backend, place, DTYPES[dtype])
        if problem:
            print(f"skip {backend}: {problem}")
        else:
            candidates.append(backend)
    if candidates == ["eager"]:
        raise RuntimeError(f"there is nothing to choose from: only eager runs on {place}")
    precision = float32_matmul("tf32") if dtype == "tf32" else nullcontext()
    total = len(jobs) * (WARMUP + ROUNDS)
    with precision, tqdm(total=total, desc=f"tune {place}", unit="round") as bar:
        for job in jobs:
            times = measure(job, _different(job, candidates), place, bar.update)
            file = remember(place.index, {job.call: times})  # at once: nothing measured is lost
            bar.write(_line(job, times))
    print(f'"auto" takes the fastest from now on, by {file}')


def _gpu(device: str) -> torch.device:
    place, count = torch.device(device), torch.cuda.device_count()
    if place.type != "cuda" or (place.index or 0) >= count:
        problem = f"got {device}, there are {count}; --dry-run prints the plan"
        raise RuntimeError(f"tune needs a CUDA device, {problem}")
    return torch.device("cuda", torch.cuda.current_device() if place.index is None else place.index)


def _problem(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` is not measured; builds the CUDA library, if it is to be had."""
    problem = unusable(backend, device, dtype)
    if problem or backend != "cuda":
        return problem
    try:
        get(backend).prepare(device)
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def _different(job: Job, candidates: Sequence[str]) -> list[str]:
    """Without those that run the same as others but for noise."""
    if job.call.verb == "dact_linear" and "triton" in candidates:
        return [each for each in candidates if each != "cuda"]  # cuBLAS's product, as composed
    return list(candidates)


def _line(job: Job, times: dict[str, float]) -> str:
    winner = min(times, key=times.__getitem__)
    told = ", ".join(f"{backend} {us:.1f}" for backend, us in times.items())
    return f"{job.describe()}: {winner} (microseconds: {told})"


def _print_plan(jobs: Sequence[Job], dtype: str) -> None:
    print(f"On a GPU, tune would measure {', '.join(CANDIDATES)}, as far as they run there, in")
    print(f"{WARMUP} + {ROUNDS} rounds of alternating calls with a cold L2 cache, {dtype}:")
    for job in jobs:
        print(f"  {job.describe()}")
        print(f"    for {job.call}")
    print(f"and write the medians to a file named after the GPU in {cache.folder()}.")
