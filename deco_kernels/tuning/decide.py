"""Who is fastest? What was measured here says so, else the cost model."""

from typing import NamedTuple

from . import cache
from .call import Call
from .chips import ChipFigures, figures_of
from .predict import Assumptions, Predictor
from .table import config_for

BY_DEFAULT = Assumptions()
WGMMA = 90  # from this compute capability on, mma.sync does not reach the tensor cores' rate


class Ranking(NamedTuple):
    """Backends with their microseconds, the fastest first; none if nothing is known.

    ``source`` says where the times are from.
    """

    times: dict[str, float]
    source: str


def ranking(index: int, kernels: str, call: Call) -> Ranking:
    """Who is fastest on CUDA device ``index``.

    Args:
        kernels: "triton" or "cuda": whose kernels are predicted where nothing was measured.
        call: what is to be computed.
    """
    measured = cache.load(index).get(call.bucket())
    if measured:
        return Ranking(_sorted(measured), "measured")
    chip = figures_of(index)
    return Ranking(_sorted(predicted(chip, kernels, call)) if chip else {}, "predicted")


def _sorted(times: dict[str, float]) -> dict[str, float]:
    return dict(sorted(times.items(), key=lambda item: item[1]))


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
        config = config_for(call.verb, call.dtype, chip.arch)
        if pools:
            times[kernels] = predictor.fused_forward(shape, config, call.activation)[0]
        else:
            times[kernels] = predictor.dact(shape, config)
    for backend, aten in (("composed", False), ("eager", True)):
        if pools:
            times[backend] = predictor.composed_forward(shape, call.activation, aten)
        else:
            times[backend] = predictor.composed_dact(shape, aten)
    return times
