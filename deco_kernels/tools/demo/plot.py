"""What does it look like? The picture of a demo: answers, loss curves and bytes saved."""

from pathlib import Path
from typing import TYPE_CHECKING

from .data import CHANCE, SCAN, SIDE, spell
from .result import DemoResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REFERENCE_COLOR, FUSED_COLOR = "#9aa0a6", "#d9480f"
RIGHT_COLOR, WRONG_COLOR = "#2b8a3e", "#c92a2a"
LINE_COLOR = "#4c8bf5"
SHOWN = 6  # questions


def draw(result: DemoResult, out: Path) -> None:
    """Write the picture of ``result`` to ``out``, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 3.8), layout="constrained")
    canvas, answers, losses, saved = figure.subplots(1, 4, width_ratios=[1.0, 0.85, 1.8, 0.85])
    _draw_canvas(canvas, result)
    _draw_answers(answers, result)
    _draw_losses(losses, result)
    _draw_saved(saved, result)
    figure.savefig(out, format="png", dpi=130)


def _draw_canvas(axes: "Axes", result: DemoResult) -> None:
    axes.imshow(result.held_out.images[0].cpu().numpy(), cmap="gray_r")
    middles = [SCAN * i + (SCAN - 1) / 2 for i in range(SIDE)]
    numbers = [str(i + 1) for i in range(SIDE)]
    axes.set_xticks(middles, numbers)
    axes.set_yticks(middles, numbers)
    axes.tick_params(length=0)
    axes.set(title="A held-out canvas", xlabel="column", ylabel="row", anchor="N")
    for i in range(1, SIDE):
        axes.axhline(SCAN * i - 0.5, color=LINE_COLOR, linewidth=1)
        axes.axvline(SCAN * i - 0.5, color=LINE_COLOR, linewidth=1)


def _draw_answers(axes: "Axes", result: DemoResult) -> None:
    """The fused model's answers to the first questions about the canvas."""
    axes.set_axis_off()
    axes.set_title("The fused model's answers")
    for i in range(SHOWN):
        y = 0.92 - 0.84 * i / (SHOWN - 1)
        answer = int(result.held_out.answers[0, i])
        predicted = int(result.fused.predictions[0, i])
        right = predicted == answer
        text = f"{predicted}" if right else f"{predicted}, not {answer}"
        axes.text(0.0, y, spell(result.held_out.questions[0, i]), va="center", fontsize=11)
        color = RIGHT_COLOR if right else WRONG_COLOR
        axes.text(0.78, y, text, va="center", fontsize=11, weight="bold", color=color)


def _draw_losses(axes: "Axes", result: DemoResult) -> None:
    models = (result.reference, REFERENCE_COLOR, 4.0), (result.fused, FUSED_COLOR, 1.0)
    for model, color, width in models:
        label = f"{model.name}: {model.accuracy:.1%}"
        axes.plot(model.losses, color=color, linewidth=width, label=label)
    axes.set(yscale="log", xlabel="step", title="Training loss, same seed and batches")
    axes.legend(frameon=False, loc="upper right", title=f"Held-out accuracy (chance {CHANCE:.0%})")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_saved(axes: "Axes", result: DemoResult) -> None:
    models = result.reference, result.fused
    bars = axes.bar(
        ["AvgPool", "FusedAvgPool"],
        [model.saved_bytes / 1024 for model in models],
        color=[REFERENCE_COLOR, FUSED_COLOR],
    )
    axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set(title="Saved for backward", ylabel="KiB per image, by the projector")
    axes.margins(y=0.1)
    axes.spines[["top", "right"]].set_visible(False)
