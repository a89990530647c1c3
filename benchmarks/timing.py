"""How long does it take? One call, or two in alternation; on a GPU with a cold cache."""

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from work import DEVICE, Job

# Cycles that a GPU idles, about two milliseconds, so that the host is ahead of it.
HEAD_START = 4_000_000


@lru_cache(maxsize=1)
def _larger_than_l2() -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return torch.empty(size, dtype=torch.int8, device=DEVICE)


def flush_l2() -> None:
    """Overwrite the GPU's L2 cache, so that a call finds nothing of the one before."""
    if DEVICE.type == "cuda":
        _larger_than_l2().zero_()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def seconds(job: Job) -> float:
    """Seconds of one call: the host's clock on a CPU, the device's own time on a GPU.

    The device starts late, when the host has queued all its work: host overhead does not count.
    """
    arguments = job.prepare()
    if DEVICE.type == "cpu":
        start = time.perf_counter()
        job.run(*arguments)
        return time.perf_counter() - start
    flush_l2()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    job.run(*arguments)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def host_seconds(run: Callable[[], object], repeat: int) -> float:
    """Seconds of a call as the host sees them, over ``repeat`` calls with a warm cache."""
    start = time.perf_counter()
    for _ in range(repeat):
        run()
    synchronize()
    return (time.perf_counter() - start) / repeat


def alternately(
    ours: Callable[[], float], oracle: Callable[[], float], rounds: int
) -> list[tuple[float, float]]:
    """What ``ours`` and ``oracle`` return, round by round, each first in every second round."""
    pairs = []
    for i in range(rounds):
        if i % 2:
            b, a = oracle(), ours()
        else:
            a, b = ours(), oracle()
        pairs.append((a, b))
    return pairs


def peak_bytes(job: Job) -> int | None:
    """How far the device's memory grows above what is there before the call; None on a CPU."""
    if DEVICE.type == "cpu":
        return None
    arguments = job.prepare()
    before = torch.cuda.memory_allocated(DEVICE)
    torch.cuda.reset_peak_memory_stats(DEVICE)
    job.run(*arguments)
    synchronize()
    return torch.cuda.max_memory_allocated(DEVICE) - before


def pedantic(benchmark, job: Job, rounds: int) -> None:
    """Time ``job`` for the printed table: host and device together, flushed between rounds."""

    def prepare() -> tuple[tuple, dict]:
        arguments = job.prepare()
        flush_l2()
        synchronize()
        return arguments, {}

    def run(*arguments: object) -> None:
        job.run(*arguments)
        synchronize()

    benchmark.pedantic(run, setup=prepare, rounds=rounds)
