"""How long should it take on a chip, and what must hold for that? A roofline, and its tables.

All times are predicted; nothing here was measured on a GPU. Simplifications, beside the numbers in
:class:`Assumptions`:

- A kernel takes as long as the slowest of its tensor-core work, its DRAM bytes and, for ours, its
  loads from L2. Those of cuBLAS are part of its efficiency. Arithmetic outside the tensor cores is
  free, also the fused kernel's pooling and GELU.
- Tiles are padded, and the last wave of tiles occupies all SMs. cuBLAS has the best of three tiles.
- What the launch before wrote is read back from L2 if all of it fits there, else from DRAM.
- The fused kernel pools its leading panels first, as fast as DRAM goes. After that all overlaps,
  however many CTAs fit on an SM.
- Step: two layers, a frozen tower, gradients of all parameters. Eager is ATen and cuBLAS;
  compile does GELU's backward and the sum of its output in one pass, and nothing else better.
"""

import math
from dataclasses import dataclass, field, fields, replace

from ..kernels.launch import Config
from .chips import ChipFigures
from .table import config_for
from .work import Shape, cdiv, counts, tasks

_CUBLAS_TILES = ((128, 256), (128, 128), (64, 128))


def _assumed(default: float, lowest: float, highest: float, text: str) -> float:
    return field(default=default, metadata={"help": text, "range": (lowest, highest)})


@dataclass(frozen=True)
class Assumptions:
    """What nobody publishes. The help of each is its definition."""

    gemm_efficiency: float = _assumed(
        0.70, 0.2, 1.0, "tensor-core rate of matrix products, of the dense peak"
    )
    fused_over_cublas: float = _assumed(
        1.0, 0.4, 1.4, "tensor-core rate of our products over cuBLAS's, where L2 is no limit"
    )
    dram_efficiency: float = _assumed(0.85, 0.3, 1.0, "memory bandwidth, of the published")
    l2_bytes_per_clock: float = _assumed(
        40.0,
        5.0,
        100.0,
        "bytes an SM loads from L2 in a clock, all SMs loading (A100: 47 at most)",
    )
    pool_efficiency: float = _assumed(1.0, 0.3, 1.0, "our pool kernel's bandwidth, of dram's")
    aten_pool_efficiency: float = _assumed(0.5, 0.1, 1.0, "ATen's pool's bandwidth, of dram's")
    pointwise_efficiency: float = _assumed(
        1.0, 0.3, 1.0, "bandwidth of elementwise kernels and sums, of dram's"
    )
    launch_us: float = _assumed(1.0, 0.0, 10.0, "us from one kernel's end to the next one's start")

    def __post_init__(self) -> None:
        for each in fields(self):
            value, lowest = getattr(self, each.name), each.metadata["range"][0]
            if not math.isfinite(value) or value < 0 or (value == 0 and lowest > 0):
                raise ValueError(f"{each.name} must be positive, got {value}")


@dataclass(frozen=True)
class Predictor:
    """Predicted times, in microseconds, on one chip under given assumptions."""

    chip: ChipFigures
    given: Assumptions

    def _dram(self, nbytes: float, efficiency: float = 1.0) -> float:
        return nbytes / (self.chip.dram_tb_s * 1e6 * self.given.dram_efficiency * efficiency)

    def _pointwise(self, nbytes: float) -> float:
        return self._dram(nbytes, self.given.pointwise_efficiency) + self.given.launch_us

    def _fresh(self, nbytes: int) -> int:
        """DRAM bytes of reading what the launch before wrote."""
        return 0 if nbytes <= self.chip.l2_mb * 1e6 else nbytes

    def _math(self, shape: Shape, tile: tuple[int, int]) -> float:
        """Tensor-core time of the product at full tiles and waves."""
        waves = cdiv(cdiv(shape.rows, tile[0]) * cdiv(shape.features, tile[1]), self.chip.sms)
        padded = 2 * waves * self.chip.sms * tile[0] * tile[1] * shape.channels
        return padded / (self.chip.tflops(shape.dtype) * 1e6 * self.given.gemm_efficiency)

    def _cublas(self, shape: Shape, nbytes: int) -> float:
        """A product that moves ``nbytes`` from and to DRAM."""
        cores = min(self._math(shape, tile) for tile in _CUBLAS_TILES)
        return max(cores, self._dram(nbytes)) + self.given.launch_us

    def _ours(
        self, shape: Shape, config: Config, l2_bytes: float, dram_bytes: float
    ) -> dict[str, float]:
        """What could limit a product in our kernels, each with its time."""
        per_clock = self.chip.sms * self.given.l2_bytes_per_clock
        cores = self._math(shape, (config.tiles["BM"], config.tiles["BN"]))
        return {
            "tensor cores": cores / self.given.fused_over_cublas,
            "L2": l2_bytes / (per_clock * self.chip.clock_ghz * 1e3),
            "DRAM": self._dram(dram_bytes),
        }

    def fused_forward(
        self, shape: Shape, config: Config, activation: bool = True
    ) -> tuple[float, str]:
        """Pool + linear (+ GELU) in one launch: its time, and what limits it after the start-up."""
        panels, _, slots, ctas = tasks(shape, config, self.chip.sms)
        lead = min(panels, cdiv(ctas, slots)) / panels
        pooling = shape.x_bytes + shape.p_bytes
        start = self._dram(lead * pooling, self.given.pool_efficiency)
        counted = counts("pool_linear", shape, config, self.chip.sms)
        l2 = counted.l2_to_sm_bytes() - lead * counted.l2_to_sm_bytes("x", "index", "weight")
        dram = (1 - lead) * pooling + shape.w_bytes + (1 + activation) * shape.z_bytes
        limits = self._ours(shape, config, l2, dram)
        slowest = max(limits, key=limits.__getitem__)
        return start + limits[slowest] + self.given.launch_us, slowest

    def composed_forward(
        self, shape: Shape, activation: bool, aten: bool, tokens_act: bool = False
    ) -> float:
        """Our pool kernel or ATen's, cuBLAS's product, then ATen's GELU.

        With ``tokens_act`` the tokens are activated before: ATen makes a copy of them for that.
        """
        pool = self.given.aten_pool_efficiency if aten else self.given.pool_efficiency
        nbytes = self._fresh(shape.p_bytes) + shape.w_bytes + shape.z_bytes
        gelu = self._pointwise(self._fresh(shape.z_bytes) + shape.z_bytes) if activation else 0.0
        pooling = self._dram(shape.x_bytes + shape.p_bytes, pool) + self.given.launch_us
        copy = self._pointwise(2 * shape.x_bytes) if tokens_act and aten else 0.0
        return copy + pooling + self._cublas(shape, nbytes) + gelu

    def peer_forward(self, shape: Shape) -> float:
        """Our pool kernel, then one cuBLASLt product whose epilogue adds the bias, stores Z, G."""
        pool = self._dram(shape.x_bytes + shape.p_bytes, self.given.pool_efficiency)
        nbytes = self._fresh(shape.p_bytes) + shape.w_bytes + 2 * shape.z_bytes
        return pool + self.given.launch_us + self._cublas(shape, nbytes)

    def _common(self, shape: Shape) -> float:
        """What every step does in cuBLAS and ATen: linear 2, both dW, the last bias's gradient."""
        second, hidden = replace(shape, channels=shape.features), shape.z_bytes
        weight = second.w_bytes
        # dW [N, K] sums over the rows.
        dw1 = replace(shape, batch=1, tokens_out=shape.features, features=shape.channels)
        dw1 = replace(dw1, channels=16 * cdiv(shape.rows, 16))
        dw2 = replace(dw1, features=shape.features)
        return (
            self._cublas(second, self._fresh(hidden) + weight + hidden)
            + self._cublas(dw2, 2 * hidden + weight)
            + self._cublas(dw1, hidden + shape.p_bytes + shape.w_bytes)
            + self._pointwise(hidden)
        )

    def dact(self, shape: Shape, config: Config) -> float:
        """The second layer's and GELU's backward in one launch, and the bias's gradient."""
        counted = counts("dact_linear", shape, config, self.chip.sms)
        sums = counted.stores["sums"].bytes
        dram = shape.p_bytes + 3 * shape.z_bytes + shape.w_bytes + sums
        slowest = max(self._ours(shape, config, counted.l2_to_sm_bytes(), dram).values())
        return slowest + self.given.launch_us + self._pointwise(self._fresh(sums))

    def composed_dact(self, shape: Shape, aten: bool) -> float:
        """The same by cuBLAS, then one elementwise kernel of ours or three passes of ATen's."""
        hidden = shape.z_bytes
        product = self._cublas(shape, shape.p_bytes + shape.w_bytes + hidden)
        if aten:  # dZ, G, and the sum of dZ
            read = self._pointwise(self._fresh(hidden) + 2 * hidden), self._pointwise(2 * hidden)
            return product + sum(read) + self._pointwise(self._fresh(hidden))
        tiles = config_for("dgelu", shape.dtype, self.chip.arch).tiles
        sums = 4 * cdiv(shape.rows, tiles["BM"]) * shape.features
        elementwise = self._pointwise(self._fresh(hidden) + 3 * hidden + sums)
        return product + elementwise + self._pointwise(self._fresh(sums))

    def fused_step(self, shape: Shape, config: Config) -> float:
        """Forward and backward of two layers with our kernels."""
        second = replace(shape, channels=shape.features)
        dact = self.dact(second, config_for("dact_linear", shape.dtype, self.chip.arch))
        return self.fused_forward(shape, config)[0] + dact + self._common(shape)

    def torch_step(self, shape: Shape, compiled: bool) -> float:
        """Forward and backward of two layers, eager or compiled."""
        second, hidden = replace(shape, channels=shape.features), shape.z_bytes
        sums = self._pointwise(0 if compiled else self._fresh(hidden))
        return (
            self._dram(shape.x_bytes + shape.p_bytes, self.given.aten_pool_efficiency)
            + self.given.launch_us
            + self._cublas(shape, self._fresh(shape.p_bytes) + shape.w_bytes + hidden)
            + self._pointwise(self._fresh(hidden) + hidden)  # gelu
            + self._cublas(second, 2 * hidden + second.w_bytes)
            + self._pointwise(self._fresh(hidden) + 2 * hidden)  # its backward
            + sums
            + self._common(shape)
        )

    def gain(self, shape: Shape, config: Config) -> float:
        """Pool + cuBLASLt over the fused forward."""
        return self.peer_forward(shape) / self.fused_forward(shape, config)[0]
