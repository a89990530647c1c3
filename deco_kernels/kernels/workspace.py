"""Where do the ticket and the flags live? In zeroed int32 that the kernel leaves zeroed."""

from concurrent.futures import ThreadPoolExecutor

import torch

from ..host.streams import capturing, current_stream

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}


def workspace_for(device: torch.device, size: int) -> torch.Tensor:
    """At least ``size`` zeroed int32 on ``device``, for one launch on the current stream.

    Kernels of one stream run one after another, so they share one buffer; other streams have
    their own. While a CUDA graph is captured the buffer is a fresh one of the graph's memory,
    zeroed in the graph, so that a replay can overlap with anything.
    """
    if device.type != "cuda" or capturing(device):
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = device, current_stream(device)
    buffer = _kept.get(key)
    if buffer is None or len(buffer) < size:
        rounded = 1 << max(10, (size - 1).bit_length())
        # In a thread of its own: what is kept must not come from a private memory pool that this
        # thread may be in, such as that of torch.compile's CUDA graphs while they warm up.
        with ThreadPoolExecutor(1) as thread:
            buffer = _kept[key] = thread.submit(_zeros, rounded, device).result()
    return buffer


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    buffer = torch.zeros(size, dtype=torch.int32, device=device)
    torch.cuda.synchronize(device)  # it was zeroed on another stream than the one that will use it
    return buffer
