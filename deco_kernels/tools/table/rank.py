"""Which configuration should be the fastest? Candidates in the order of their predicted times.

Registers are not modelled, nor is shared memory: :mod:`deco_kernels.tools.table.search` compiles.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import torch

from ...kernels.launch import Config
from ...tuning.chips import CHIPS
from ...tuning.predict import Assumptions, Predictor
from ...tuning.work import Shape

DTYPES = {2: torch.bfloat16, 4: torch.float32}  # ranked for each element size
RANKED = ("pool_linear", "dact_linear")

# LLaVA-1.5 for one and for many images, and Gemma 3.
_SIZES = (
    (8, (24, 24), (12, 12), 1024, 4096),
    (64, (24, 24), (12, 12), 1024, 4096),
    (8, (64, 64), (16, 16), 1152, 2560),
)
# Rows of a pool task and bytes of a row at once: 16 bytes a thread, one or two times.
_POOL_TASKS = ((4, 1024), (8, 512), (16, 512))
# Rows, columns and warps of a tile; of a tie, the first. Larger tiles have more sums than 8 warps
# have registers. Each warp has 64 x 32 or more: of less, mma.sync asks shared memory for more than
# an A100's can give, which is not modelled.
_TILES = ((128, 128, 8), (64, 128, 4), (64, 256, 8), (128, 256, 8), (256, 128, 8))


def constants(itemsize: int) -> dict[str, Config]:
    """Kernels that wait for memory only, which the model does not tell apart."""
    pool = {2: {"PM": 8, "PK": 512}, 4: {"PM": 4, "PK": 256}}[itemsize]
    dgelu = {2: {"BM": 64, "BN": 128}, 4: {"BM": 32, "BN": 128}}[itemsize]
    return {
        "pool": Config(pool, num_warps=4, num_stages=1),
        "bias_grad": Config({"RN": 128}, num_warps=4, num_stages=1),
        "dgelu": Config(dgelu, num_warps=8, num_stages=1),
    }


def candidates(kernel: str, itemsize: int) -> list[Config]:
    """The configurations of a product, in any order; its loop is 128 bytes deep."""
    heads = [{"GROUP": 8}]
    if kernel == "pool_linear":
        heads = [{"PM": pm, "PK": nbytes // itemsize} for pm, nbytes in _POOL_TASKS]
    return [
        Config({**head, "BM": bm, "BN": bn, "BK": 128 // itemsize}, num_warps=warps, num_stages=3)
        for head, (bm, bn, warps) in product(heads, _TILES)
    ]


def _us(kernel: str, itemsize: int, arch: int, config: Config) -> float:
    """To a tenth, so that rounding errors break no tie."""
    total = 0.0
    for chip, sizes in product(CHIPS.values(), _SIZES):
        if chip.arch == arch:
            predictor = Predictor(chip, Assumptions())
            shape = Shape.adaptive(*sizes, DTYPES[itemsize])
            if kernel == "pool_linear":
                total += predictor.fused_forward(shape, config)[0]
            else:
                total += predictor.dact(replace(shape, channels=shape.features), config)
    return round(total, 1)


def ranked(kernel: str, itemsize: int, arch: int) -> list[tuple[float, Config]]:
    """Candidates with their predicted microseconds, the fastest first.

    Args:
        kernel: of :data:`RANKED`.
        itemsize: bytes of an element.
        arch: of a chip in :data:`~.chips.CHIPS`; times are summed over its chips and three shapes.
    """
    found = [(_us(kernel, itemsize, arch, each), each) for each in candidates(kernel, itemsize)]
    return sorted(found, key=lambda pair: pair[0])


def firsts() -> Iterator[str]:
    """The fastest candidate of every kernel, as lines of text; the compiler was not asked."""
    for arch in sorted({chip.arch for chip in CHIPS.values()}):
        for kernel, itemsize in product(RANKED, DTYPES):
            us, config = ranked(kernel, itemsize, arch)[0]
            yield f"sm_{arch} {kernel} {itemsize} bytes  {config}  {us:.1f} us  not compiled"
