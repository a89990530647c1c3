"""What do the makers say of a chip? The published figures that the cost model starts from."""

from dataclasses import dataclass

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

    def tflops(self, dtype: torch.dtype) -> float:
        """The dense tensor-core rate for elements of ``dtype``, TFLOP/s."""
        return self.bf16_tflops if dtype.itemsize == 2 else self.tf32_tflops


# Rates are dense (data sheets of Hopper, Ada and Blackwell print those with sparsity: halved here).
# The clock of H100, H200 and B200 is the one that their tensor rates imply: rate / SMs / FLOPs of
# an SM and clock (4096 on Hopper, 8192 on B200).
_ALL = (
    # A100 80GB SXM data sheet; Ampere GA100 white paper.
    ChipFigures("A100", 80, 108, 1.41, 312, 156, 2.039, 40, 163),
    # H100 SXM5 and H200 SXM data sheets; Hopper GH100 white paper.
    ChipFigures("H100", 90, 132, 1.83, 989.4, 494.7, 3.35, 50, 227),
    ChipFigures("H200", 90, 132, 1.83, 989.4, 494.7, 4.8, 50, 227),
    # HGX B200 data sheet, an eighth of it; CUDA's Blackwell tuning guide.
    ChipFigures("B200", 100, 148, 1.86, 2250, 1125, 8.0, 126, 227),
    # L40S data sheet; Ada white paper.
    ChipFigures("L40S", 89, 142, 2.52, 362, 183, 0.864, 96, 99),
    # Ada and RTX Blackwell white papers; with float32 sums GeForce tensor cores run at half rate.
    ChipFigures("RTX4090", 89, 128, 2.52, 165.2, 82.6, 1.008, 72, 99),
    ChipFigures("RTX5090", 120, 170, 2.41, 209.5, 104.8, 1.792, 96, 99),
)
CHIPS = {chip.name: chip for chip in _ALL}
