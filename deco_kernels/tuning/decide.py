"""Who is fastest? What was measured here says so, else the cost model."""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..kernels.launch import Config
from . import cache
from .call import Call
from .chips import ChipFigures, figures_of
from .predict import Assumptions, Predictor
from .table import config_for

BY_DEFAULT = Assumptions()
WGMMA = 90  # from this compute capability on, mma.sync does not reach the tensor cores' rate


class Ranking(NamedTuple):
    """Backends, the fastest first; none if nothing is known. ``reason`` has their times."""

    backends: tuple[str, ...]
    reason: str


@lru_cache(maxsize=4096)
def ranking(index: int, kernels: str, call: Call) -> Ranking:
    """Who is fastest on CUDA device ``index``.

    Args:
        kernels: "triton" or "cuda": whose kernels are predicted where nothing was measured.
        call: what is to be computed.
    """
    times, source = cache.load(index).get(call.bucket()), "measured"
    if times is None:
        chip, source = figures_of(index), "predicted"
        times = predicted(chip, kernels, call) if chip else {}
    order = tuple(sorted(times, key=times.__getitem__))
    told = ", ".join(f"{backend} {times[backend]:.3g}" for backend in order)
    return Ranking(order, f"{source} microseconds: {told}")


def remember(index: int, measured: Mapping[Call, cache.Times]) -> Path:
    """Store measurements on CUDA device ``index``; rankings go by them from now on.

    Raises:
        OSError, RuntimeError: they cannot be written.
    """
    file = cache.store(index, measured)
    ranking.cache_clear()
    return file


def _tiles(kernels: str, call: Call, chip: ChipFigures) -> Config:
    if kernels == "triton":
        return config_for(call.verb, call.dtype, chip.arch)
    size = call.dtype.itemsize  # as csrc/pool_linear.cu has them
    tiles = {"PM": 16, "PK": 512 // size, "BM": 128, "BN": 128, "BK": 64 // size}
    return Config(tiles, num_warps=8, num_stages=3)


def predicted(
    chip: ChipFigures, kernels: str, call: Call, given: Assumptions = BY_DEFAULT
) -> dict[str, float]:
    """Microseconds by the cost model, by backend.

    The fused kernel is left out where the model is not for it: a size that 8 does not divide, and
    CUDA C++ on chips whose tensor cores want more than mma.sync.
    """
    shape, predictor = call.shape(), Predictor(chip, given)
    pools = call.verb == "pool_linear"
    ours = not (call.channels % 8 or call.features % 8)
    ours &= kernels == "triton" or (pools and chip.arch < WGMMA)
    times = {}
    if ours:
        config = _tiles(kernels, call, chip)
        if pools:
            times[kernels] = predictor.fused_forward(shape, config, call.activation)[0]
        else:
            times[kernels] = predictor.dact(shape, config)
    for backend, aten in (("composed", False), ("eager", True)):
        if pools:
            times[backend] = predictor.composed_forward(
                shape, call.activation, aten, tokens_act=call.act is not None
            )
        else:
            times[backend] = predictor.composed_dact(shape, aten)
    return times
