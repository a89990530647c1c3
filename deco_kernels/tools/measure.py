"""How is it measured? Seconds of a call, saved bytes, and by which float32 products."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..host.private import idle_gpu

# Cycles that a GPU idles, about two milliseconds, so that the host is ahead of it.
HEAD_START = 4_000_000


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: the host's clock on a CPU, the device's own time on a GPU.

    The GPU starts with nothing in its L2 cache, and late, when the host has queued all its work:
    host overhead does not count.
    """
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        flush_l2(device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        idle_gpu(HEAD_START)
        begin.record()
        run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def flush_l2(device: torch.device) -> None:
    """Overwrite a GPU's L2 cache, so that a call finds nothing of the one before."""
    if device.type == "cuda":
        _larger_than_l2(device).zero_()


@lru_cache(maxsize=1)
def _larger_than_l2(device: torch.device) -> torch.Tensor:
    size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.int8, device=device)


def saved_bytes(run: Callable[[], object], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of the distinct storages that autograd saves for backward while ``run()`` runs.

    Args:
        run: computes a forward; its result is kept alive while the bytes are counted.
        exclude: tensors that do not count, such as ``module.parameters()``.
    """
    known = {t.untyped_storage().data_ptr() for t in exclude}
    saved: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        pointer = t.untyped_storage().data_ptr()
        if pointer not in known:
            saved[pointer] = t  # held: a freed storage's address could come back as another's
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    total = sum(t.untyped_storage().nbytes() for t in saved.values())
    del result
    return total


@contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """Torch's float32 matrix products by "ieee" rules or in "tf32"."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
