"""Fused average-pool projectors for multimodal language models."""

from .reference import AvgPoolProjector

__all__ = ["AvgPoolProjector"]
__version__ = "0.1.0"
