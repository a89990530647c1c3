"""How much of the device is that? Rates, and the share of what the device can do at most."""

import platform

import torch
from cases import Mode, Shape
from work import DEVICE, DTYPE

import deco_kernels
from deco_kernels.tuning.chips import listed_as


def device_name() -> str:
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name(DEVICE)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def versions() -> dict[str, str | None]:
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "deco_kernels": deco_kernels.__version__,
        "torch": torch.__version__,
        "triton": triton and triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def rates(shape: Shape, mode: Mode, seconds: float) -> dict[str, float | None]:
    """What ``seconds`` mean, by the operations and bytes that `Shape` counts.

    The roofline is the longer one of operations / peak rate and bytes / peak bandwidth; the peaks,
    and the share of it, are None where they are not published.
    """
    flops, moved = shape.flops(mode), shape.traffic(mode, DTYPE.itemsize)
    chip = listed_as(device_name())
    at_best = chip and max(flops / chip.tflops(DTYPE), moved / chip.dram_tb_s) / 1e12
    return {
        "gigabytes_per_second": moved / seconds / 1e9,
        "teraflop_per_second": flops / seconds / 1e12,
        "percent_of_roofline": at_best and 100 * at_best / seconds,
        "peak_teraflop_per_second": chip and chip.tflops(DTYPE),
        "peak_gigabytes_per_second": chip and 1e3 * chip.dram_tb_s,
    }
