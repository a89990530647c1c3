"""Fused average-pool projectors for multimodal language models."""

from .functional import act_linear, act_pool_linear, pool, pool_linear
from .integrations import fuse, unfuse
from .projector import FusedAvgPoolProjector
from .reference import AvgPoolProjector
from .stencil import Stencil

__all__ = [
    "AvgPoolProjector",
    "FusedAvgPoolProjector",
    "Stencil",
    "act_linear",
    "act_pool_linear",
    "fuse",
    "pool",
    "pool_linear",
    "unfuse",
]
__version__ = "0.1.0"
