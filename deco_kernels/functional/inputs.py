"""Are the tensors what we can work with? Checked before anything is launched or changed."""

import math

import torch

from ..host.private import wraps_tensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_BYTES = 2**63 - 1
ORDINARY = (torch.nn.Parameter, torch.Tensor)


def ordinary(x: torch.Tensor) -> bool:
    """Whether ``x`` holds its own numbers: a DTensor and its like wrap other tensors."""
    return type(x) in ORDINARY or not wraps_tensors(type(x))


def check_tokens(name: str, x: torch.Tensor) -> None:
    """A floating-point tensor [B, n, K]."""
    check_float(name, x)
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested tensor" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")
    if x.dim() != 3:
        raise ValueError(f"{name} must be [batch, tokens, channels], got shape {list(x.shape)}")


def check_size(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """An output whose bytes an int64 can count; in a compiled graph torch sees to that."""
    if not torch.compiler.is_compiling() and math.prod(shape) * dtype.itemsize > MAX_BYTES:
        raise ValueError(f"an output of shape {list(shape)} and {dtype} exceeds the int64 range")


def check_linear(
    name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, any_float: bool
) -> None:
    """A weight [N, K] and perhaps a bias [N] for x [B, n, K]; of x's dtype unless ``any_float``."""
    if not x.shape[2]:
        raise ValueError(f"{name} must have channels, got shape {list(x.shape)}")
    if weight.dim() == 2 and not weight.shape[0]:
        raise ValueError(f"weight must have rows, got shape {list(weight.shape)}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[2]:
        raise ValueError(
            f"weight must be [out, {x.shape[2]}] for the {x.shape[2]} channels of {name},"
            f" got shape {list(weight.shape)}"
        )
    if weight.device != x.device:
        raise RuntimeError(f"{name} is on {x.device}, but weight is on {weight.device}")
    if weight.dtype != x.dtype and not any_float:
        raise TypeError(f"{name} is {x.dtype}, but weight is {weight.dtype}")
    if bias is None:
        return
    check_float("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}], got shape {list(bias.shape)}")
    if bias.device != weight.device:
        raise RuntimeError(f"weight is on {weight.device}, but bias is on {bias.device}")
    if bias.dtype != weight.dtype and not any_float:
        raise TypeError(f"weight is {weight.dtype}, but bias is {bias.dtype}")


def check_ordinary(name: str, x: torch.Tensor) -> None:
    """No DTensor or another wrapper of tensors, whose numbers kernels do not find."""
    if not ordinary(x):
        raise TypeError(f"{name} must be an ordinary tensor, got {type(x).__name__}")


def check_float(name: str, x: torch.Tensor) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
