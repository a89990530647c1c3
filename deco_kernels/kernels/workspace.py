"""Where do the ticket and the flags live? A zeroed int32 buffer that the kernel leaves zeroed."""

import torch

HEADER = 2  # ticket, CTAs that have finished; then one flag for each panel

_kept: dict[tuple[torch.device, int], torch.Tensor] = {}


def workspace_for(device: torch.device, size: int) -> torch.Tensor:
    """At least ``size`` zeroed int32 on ``device``, for one launch on the current stream.

    Kernels of one stream run one after another, so they share one buffer; other streams have
    their own. While a CUDA graph is captured the buffer is a fresh one of the graph's memory,
    zeroed in the graph, so that a replay can overlap with anything.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int32, device=device)
    key = device, torch.cuda.current_stream(device).cuda_stream
    buffer = _kept.get(key)
    if buffer is None or len(buffer) < size:
        rounded = 1 << max(10, (size - 1).bit_length())
        buffer = _kept[key] = torch.zeros(rounded, dtype=torch.int32, device=device)
    return buffer
