"""The static table: one configuration for each kernel and element type.

Chosen by what `python -m deco_kernels compile` shows for sm_80, 90, 100 and 120: no spilled
bytes, shared memory for at least one CTA an SM on every chip (99 KiB on the smallest), tensor
cores in the loop. Nothing here depends on the number of images or tokens, so that a new batch size
never compiles anew.
"""

import torch

from ..kernels.launch import Config

_BIAS_GRAD = Config({"RN": 128}, num_warps=4, num_stages=1)
_16_BIT = {
    "bias_grad": _BIAS_GRAD,
    "dgelu": Config({"BM": 64, "BN": 128}, num_warps=8, num_stages=1),
    "pool": Config({"PM": 8, "PK": 512}, num_warps=4, num_stages=1),
    "pool_linear": Config(
        {"PM": 16, "PK": 256, "BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3
    ),
    "dact_linear": Config({"GROUP": 8, "BM": 128, "BN": 128, "BK": 64}, num_warps=8, num_stages=3),
}
_32_BIT = {
    "bias_grad": _BIAS_GRAD,
    "dgelu": Config({"BM": 32, "BN": 128}, num_warps=8, num_stages=1),
    "pool": Config({"PM": 4, "PK": 256}, num_warps=4, num_stages=1),
    "pool_linear": Config(
        {"PM": 16, "PK": 128, "BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=3
    ),
    "dact_linear": Config({"GROUP": 8, "BM": 128, "BN": 128, "BK": 32}, num_warps=8, num_stages=3),
}


def config_for(kernel: str, dtype: torch.dtype) -> Config:
    """The configuration of a kernel, by its name, for elements of ``dtype``."""
    return (_16_BIT if dtype.itemsize == 2 else _32_BIT)[kernel]
