"""How long does it take? One call, or two in alternation; on a GPU with a cold cache."""

import time
from collections.abc import Callable

import torch
from work import DEVICE, Job

from deco_kernels.tools import measure


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def seconds(job: Job) -> float:
    """Seconds of one call, on a GPU with nothing in its L2 cache; see `measure.seconds`."""
    arguments = job.prepare()
    return measure.seconds(lambda: job.run(*arguments), DEVICE)


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


def beside(
    ours: Callable[[], object], oracle: Callable[[], object], rounds: int, repeat: int
) -> list[tuple[float, float]]:
    """(our seconds, the oracle's seconds) of a call as the host sees them, round by round."""
    pairs = alternately(
        lambda: host_seconds(ours, repeat), lambda: host_seconds(oracle, repeat), rounds + 1
    )
    return pairs[1:]  # the first round warms up


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
        measure.flush_l2(DEVICE)
        synchronize()
        return arguments, {}

    def run(*arguments: object) -> None:
        job.run(*arguments)
        synchronize()

    benchmark.pedantic(run, setup=prepare, rounds=rounds)
