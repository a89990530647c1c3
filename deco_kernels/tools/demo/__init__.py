"""Does it train? A tiny multimodal language model, trained with either projector."""

from .result import DemoResult, ModelResult
from .train import run

__all__ = ["DemoResult", "ModelResult", "run"]
