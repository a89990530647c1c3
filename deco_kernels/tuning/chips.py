"""What do the makers say of a chip? The published figures that the cost model starts from."""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class ChipFigures:
    """One GPU, as its data sheet and architecture white paper describe it.

    Attributes:
        name: as on the command line.
        arch: compute capability, 90 for 9.0.
        sms: streaming multiprocessors.
        clock_ghz: boost clock at which the tensor rates below hold.
        bf16_tflops: dense 16-bit tensor-core rate with float32 sums, TFLOP/s.
        tf32_tflops: dense TF32 tensor-core rate, TFLOP/s.
        dram_tb_s: memory bandwidth, TB/s.
        l2_mb: size of the L2 cache, MB.
        shared_kb: shared memory of an SM that one CTA can have, KiB.
        driver_name: what the driver calls it.
    """

    name: str
    arch: int
    sms: int
    clock_ghz: float
    bf16_tflops: float
    tf32_tflops: float
    dram_tb_s: float
    l2_mb: int
    shared_kb: int
    driver_name: str

    def tflops(self, dtype: torch.dtype) -> float:
        """The dense tensor-core rate for elements of ``dtype``, TFLOP/s."""
        return self.bf16_tflops if dtype.itemsize == 2 else self.tf32_tflops


# Rates are dense (data sheets of Hopper, Ada and Blackwell print those with sparsity: halved here).
# The clock of H100, H200 and B200 is the one that their tensor rates imply: rate / SMs / FLOPs of
# an SM and clock (4096 on Hopper, 8192 on B200).
_ALL = (
    # A100 80GB SXM data sheet; Ampere GA100 white paper.
    ChipFigures("A100", 80, 108, 1.41, 312, 156, 2.039, 40, 163, "NVIDIA A100-SXM4-80GB"),
    # H100 SXM5 and H200 SXM data sheets; Hopper GH100 white paper.
    ChipFigures("H100", 90, 132, 1.83, 989.4, 494.7, 3.35, 50, 227, "NVIDIA H100 80GB HBM3"),
    ChipFigures("H200", 90, 132, 1.83, 989.4, 494.7, 4.8, 50, 227, "NVIDIA H200"),
    # HGX B200 data sheet, an eighth of it; CUDA's Blackwell tuning guide.
    ChipFigures("B200", 100, 148, 1.86, 2250, 1125, 8.0, 126, 227, "NVIDIA B200"),
    # L40S data sheet; Ada white paper.
    ChipFigures("L40S", 89, 142, 2.52, 362, 183, 0.864, 96, 99, "NVIDIA L40S"),
    # Ada and RTX Blackwell white papers; with float32 sums GeForce tensor cores run at half rate.
    ChipFigures("RTX4090", 89, 128, 2.52, 165.2, 82.6, 1.008, 72, 99, "NVIDIA GeForce RTX 4090"),
    ChipFigures("RTX5090", 120, 170, 2.41, 209.5, 104.8, 1.792, 96, 99, "NVIDIA GeForce RTX 5090"),
)
CHIPS = {chip.name: chip for chip in _ALL}

# Dense 16-bit FLOPs with float32 sums of an SM in a clock, by compute capability: the rates above,
# the Turing white paper, and the Ampere GA102 white paper. GeForce has half of 7.5, 8.6, 8.9, 12.0.
_FLOPS = {75: 1024, 80: 2048, 86: 1024, 89: 1024, 90: 4096, 100: 8192, 103: 8192, 120: 1024}


@lru_cache(maxsize=64)
def figures_of(index: int) -> ChipFigures | None:
    """The published figures of CUDA device ``index``, else what its driver says of it.

    None where the compute capability or the driver's answers are not known.
    """
    p = torch.cuda.get_device_properties(index)
    listed = listed_as(p.name)
    if listed is not None:
        return listed
    arch = 10 * p.major + p.minor
    asked = ("clock_rate", "memory_clock_rate", "memory_bus_width", "L2_cache_size")
    kilohertz, memory_kilohertz, bits, l2_bytes = (getattr(p, name, 0) for name in asked)
    if arch not in _FLOPS or not (kilohertz and memory_kilohertz and bits):
        return None
    ghz = kilohertz / 1e6
    tflops = p.multi_processor_count * ghz * _FLOPS[arch] / 1e3
    if "GeForce" in p.name and arch not in (80, 90, 100, 103):
        tflops /= 2
    dram = 2 * memory_kilohertz * 1e3 * bits / 8 / 1e12  # two transfers a clock
    shared_kb = getattr(p, "shared_memory_per_block_optin", 0) // 1024
    l2_mb = int(l2_bytes / 1e6)
    return ChipFigures(
        p.name,
        arch,
        p.multi_processor_count,
        ghz,
        tflops,
        tflops / 2,
        dram,
        l2_mb,
        shared_kb,
        p.name,
    )


def listed_as(driver_name: str) -> ChipFigures | None:
    """The published figures of the chip that the driver calls so."""
    return next((chip for chip in _ALL if chip.driver_name == driver_name), None)
