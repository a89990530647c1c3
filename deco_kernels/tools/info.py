"""What is here? Versions, devices, and the backends with the reason why one is not usable."""

import argparse
import platform
import sys

import torch

from .. import __version__
from ..backends import BACKENDS, preferred, unusable
from ..host import library
from ..tuning import cache, table

HELP = "versions, devices, and which backends are usable and why not"
DTYPES = torch.bfloat16, torch.float16, torch.float32, torch.float64


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return f"missing ({error})"
    return triton.__version__


def _tiles() -> str:
    made = table.made_with()
    here = _triton()
    other = (
        "" if here == made or here.startswith("missing") else f", not with the {here} that is here"
    )
    return f"chosen and compiled with Triton {made}{other}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices() -> list[tuple[str, str]]:
    lines = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.1f} GiB"
        capability = f"compute capability {p.major}.{p.minor}"
        text = f"{p.name}, {capability}, {p.multi_processor_count} SMs, {memory}"
        lines.append((f"device cuda:{i}", text))
    return [*lines, ("device cpu", platform.machine())]


def _backend(backend: str, device: torch.device) -> str:
    """For which dtypes it can run on ``device``, and why not for the others."""
    dtypes: dict[str | None, list[str]] = {}
    for dtype in DTYPES:
        dtypes.setdefault(unusable(backend, device, dtype), []).append(_name(dtype))
    parts = []
    for reason, names in dtypes.items():
        verdict = "usable" if reason is None else f"not usable: {reason}"
        parts.append(verdict if len(dtypes) == 1 else f"{', '.join(names)} {verdict}")
    return "; ".join(parts)


def _tuned(device: torch.device) -> str:
    if device.type != "cuda":
        return "needs a CUDA device"
    calls = len(cache.load(device.index))
    measured = f"{calls} calls in {cache.path(device.index)}" if calls else "nothing yet"
    return f"{measured}: python -m deco_kernels tune"


def _auto(device: torch.device) -> str:
    backend, reason = preferred(device, torch.bfloat16)
    if backend == "eager":
        return f"eager on {device}: {reason}"
    return f"{backend}, composed or eager on {device}, the fastest for a call's sizes: {reason}"


def report() -> str:
    """Aligned lines of text."""
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    lines = [
        ("deco_kernels", __version__),
        ("python", f"{platform.python_version()} on {sys.platform}"),
        ("torch", torch.__version__),
        ("triton", _triton()),
        ("tiles", _tiles()),
        ("CUDA", torch.version.cuda or "none (this torch is built without it)"),
        ("CUDA kernels", library.state()),
        *_devices(),
        ("float32 products", torch.backends.cuda.matmul.fp32_precision),
        *((f"backend {b}", _backend(b, device)) for b in BACKENDS if b != "auto"),
        ("backend auto", _auto(device)),
        ("measured for auto", _tuned(device)),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {text}" for name, text in lines)


def arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def main() -> int:
    print(report())
    return 0
