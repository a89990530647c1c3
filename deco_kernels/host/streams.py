"""What is a device doing right now?"""

import torch


def current_stream(device: torch.device) -> int:
    """The handle of the stream that work for the device goes to; 0 where there are no streams."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether that stream's work becomes part of a CUDA graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
