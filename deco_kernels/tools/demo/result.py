"""What came of it? Both trainings in numbers, side by side."""

from dataclasses import dataclass
from statistics import mean, median

import torch

from .data import CHANCE, Batch


@dataclass(frozen=True)
class ModelResult:
    """What came of training one model."""

    name: str  # of its projector
    parameters: int
    losses: list[float]  # of every step
    seconds: list[float]  # of every step
    predictions: torch.Tensor  # [b, q], its answers to the held-out questions
    accuracy: float  # of these
    saved_bytes: int  # that its projector saves for backward, for one image

    @property
    def final_loss(self) -> float:
        """The mean loss of the last 20 steps."""
        return mean(self.losses[-20:])

    @property
    def step_seconds(self) -> float:
        """The median time of a step."""
        return median(self.seconds)


@dataclass(frozen=True)
class DemoResult:
    """Both models, and how they compare."""

    reference: ModelResult
    fused: ModelResult
    held_out: Batch
    device: str
    path: str  # the backend and path that the fused projector took, and why

    @property
    def max_difference(self) -> float:
        """The largest difference between the two losses of a step."""
        return max(self._differences())

    @property
    def relative_difference(self) -> float:
        """The mean difference between the two losses of a step, in units of the mean loss."""
        return mean(self._differences()) / mean(self.reference.losses)

    def _differences(self) -> list[float]:
        pairs = zip(self.reference.losses, self.fused.losses, strict=True)
        return [abs(reference - fused) for reference, fused in pairs]

    def __str__(self) -> str:
        both = self.reference, self.fused
        rows = [
            ("", [m.name for m in both]),
            ("parameters", [f"{m.parameters:,}" for m in both]),
            ("loss, mean of the last 20 steps", [f"{m.final_loss:.4f}" for m in both]),
            ("accuracy on held-out canvases", [f"{m.accuracy:.1%}" for m in both]),
            ("median time per step", [f"{m.step_seconds * 1e3:.1f} ms" for m in both]),
            ("projector saves for backward", [f"{m.saved_bytes:,} B/image" for m in both]),
        ]
        table = [f"{label:<34}{first:>18}{second:>25}" for label, (first, second) in rows]
        notes = [
            f"held out: {self.held_out.answers.numel():,} questions about scans that were never"
            f" trained on; chance is {CHANCE:.0%}",
            f"loss curves: max |difference| {self.max_difference:.2g},"
            f" mean |difference| / mean loss {self.relative_difference:.2g}",
            f"{self.fused.name} on {self.device}: {self.path}",
        ]
        return "\n".join([*table, "", *notes])
