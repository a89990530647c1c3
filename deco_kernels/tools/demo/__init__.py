"""Does it train? A tiny multimodal model, trained with either projector on the same data."""

import argparse
from pathlib import Path
from typing import Any

from ..arguments import where
from .result import DemoResult, ModelResult
from .train import run

__all__ = ["DemoResult", "ModelResult", "run"]
HELP = "train a tiny multimodal model with either projector, and plot"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, help="the picture to write")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    where(parser)


def main(**options: Any) -> int:
    run(**options)
    return 0
