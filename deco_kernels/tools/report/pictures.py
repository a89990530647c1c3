"""What does it look like? Time beside eager's, bytes kept, and where under the roofline."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...tuning.chips import CHIPS
from .collect import Results, Row, memory, speed, write
from .plan import missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which the colour-blind can tell apart; markers tell them apart in grey.
LOOKS = {
    "eager": ("#999999", "o"),
    "compile": ("#E69F00", "s"),
    "compile-max-autotune": ("#F0E442", "D"),
    "reshape-mean": ("#56B4E9", "^"),
    "cublaslt-epilogue": ("#CC79A7", "v"),
    "ours-triton": ("#D55E00", "*"),
    "ours-cuda": ("#0072B2", "P"),
    "ours-composed": ("#009E73", "X"),
    "ours-eager": ("#000000", "d"),
}
MODES = {"step-frozen": "training step, frozen tower", "forward": "forward"}
TOWERS = {"step-frozen": "frozen tower", "step-trained": "trained tower"}

# Of [64, 576, 1024] -> [64, 144, 4096] in bfloat16, which `predict` is about: 2 M K N operations;
# X and W are read, P, Z and gelu(Z) written.
ROWS, TOKENS, CHANNELS, FEATURES = 64 * 144, 64 * 576, 1024, 4096
FORWARD_FLOPS = 2 * ROWS * CHANNELS * FEATURES
FORWARD_BYTES = 2 * ((TOKENS + FEATURES + ROWS) * CHANNELS + 2 * ROWS * FEATURES)


@dataclass
class Pictures:
    """The pictures there are, by the section of the page they belong to.

    ``missing`` says which package is not there to draw them, ``error`` what went wrong.
    """

    FILES = ("speed.png", "memory.png", "roofline.png")
    missing: str | None = field(default_factory=lambda: missing({"matplotlib": "matplotlib"}))
    error: str | None = None
    sections: dict[str, str] = field(default_factory=dict)
    _drawn: dict[str, list[Row]] = field(default_factory=dict)

    def draw(self, results: Results, out: Path) -> None:
        """Draw to ``out`` what there are new rows for."""
        if self.missing:
            return
        times, kept = speed(results.benchmarks), memory(results.benchmarks)
        wanted = [
            ("speed.png", "speed", draw_speed, [r for r in times if r["mode"] in MODES]),
            ("memory.png", "memory", draw_memory, kept),
        ]
        below = [row for row in times if row["peak_teraflop_per_second"] and row["mode"] in MODES]
        shipped = [row for row in results.predicted if row.get("config") == "shipped"]
        if below:
            wanted.append(("roofline.png", "speed_roofline", draw_roofline, below))
        else:
            wanted.append(("roofline.png", "predict", draw_predicted, shipped))
        for name, section, drawing, rows in wanted:
            if rows and rows != self._drawn.get(name):
                try:
                    write(out / name, _png(drawing(rows)))
                except Exception as error:  # a picture must not cost the rest of the report
                    self.error = f"{name}: {error}"
                    continue
                self._drawn[name], self.sections[section] = rows, name

    def of(self, section: str) -> list[str]:
        """Its pictures."""
        return [name for key, name in self.sections.items() if key.partition("_")[0] == section]


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: "Figure") -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, metadata={"Software": None})
    return out.getvalue()


def _distinct(rows: Sequence[Row], column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in rows))


def _by_shape(axes: "Axes", shapes: Sequence[str]) -> None:
    """A line for each shape, the first one at the top."""
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set_ylim(len(shapes) - 0.5, -0.5)
    for i in range(1, len(shapes)):
        axes.axhline(i - 0.5, color="#dddddd", linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)


def _panels(rows: Sequence[Row], modes: dict[str, str]) -> "tuple[Figure, list[tuple]]":
    """A panel for each mode there is; with it, its rows and the height of each provider's line."""
    shapes = _distinct(rows, "shape")
    providers = sorted(_distinct(rows, "provider"), key=list(LOOKS).index)
    shown = [mode for mode in modes if any(row["mode"] == mode for row in rows)]
    figure = _figure(11, 1.6 + 0.16 * len(shapes) * max(4, len(providers)))
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    step = 0.8 / len(providers)
    heights = {p: (i + 0.5) * step - 0.4 for i, p in enumerate(providers)}
    panels = []
    for each, mode in zip(axes, shown, strict=True):
        _by_shape(each, shapes)
        each.set_title(modes[mode], fontsize=11)
        chosen = [row for row in rows if row["mode"] == mode]
        panels.append((each, [(row, shapes.index(row["shape"]), heights) for row in chosen]))
    return figure, panels


def _legend(place: "Figure | Axes", axes: "Axes", **how: object) -> None:
    """What is drawn in ``axes``, each kind once and always in the same order."""
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    order = [name for name in LOOKS if name in unique] or list(unique)
    place.legend([unique[name] for name in order], order, frameon=False, **how)


def draw_speed(rows: Sequence[Row]) -> "Figure":
    """Ratios to eager's time with the range of the rounds, by shape."""
    figure, panels = _panels(rows, MODES)
    for axes, lines in panels:
        axes.axvline(1, color="#999999", linewidth=1, linestyle="--")
        for row, line, heights in lines:
            color, marker = LOOKS[row["provider"]]
            ratio = row["ratio_to_eager"]
            around = [[ratio - row["ratio_lowest"]], [row["ratio_highest"] - ratio]]
            axes.errorbar(
                ratio,
                line + heights[row["provider"]],
                xerr=around,
                color=color,
                marker=marker,
                markersize=7,
                elinewidth=1.5,
                linestyle="",
                label=row["provider"],
            )
        axes.set_xlabel("time / eager's time (left of the dashed line: faster)")
    figure.suptitle(f"Measured on {rows[0]['device']}, {rows[0]['dtype']}; bars: all rounds")
    _legend(figure, panels[0][0], loc="outside lower center", ncols=5)
    return figure


def draw_memory(rows: Sequence[Row]) -> "Figure":
    """Bytes kept for backward, by shape, with their ratio to eager's."""
    figure, panels = _panels(rows, TOWERS)
    for axes, lines in panels:
        for row, line, heights in lines:
            provider = row["provider"]
            bar = axes.barh(
                line + heights[provider],
                row["saved_bytes"] / 2**20,
                height=0.8 / len(heights),
                color=LOOKS[provider][0],
                label=provider,
            )
            if provider.startswith("ours"):
                text = f"{row['ratio_to_eager']:.2f} of eager's"
                axes.bar_label(bar, [text], padding=3, fontsize=8)
        axes.set_xlabel("kept for backward, MiB")
        axes.margins(x=0.2)
    figure.suptitle(f"Counted: bytes that autograd keeps, {rows[0]['dtype']}, without parameters")
    _legend(figure, panels[0][0], loc="outside lower center", ncols=5)
    return figure


def draw_roofline(rows: Sequence[Row]) -> "Figure":
    """Measured rates below the device's published roofline; hollow: forward, full: step."""
    figure = _figure(9, 5.5)
    axes = figure.subplots()
    peak, bandwidth = rows[0]["peak_teraflop_per_second"], rows[0]["peak_gigabytes_per_second"]
    points = [(1e3 * row["teraflop_per_second"] / row["gigabytes_per_second"], row) for row in rows]
    ridge = 1e3 * peak / bandwidth
    ends = [min(ridge, *(x for x, _ in points)) / 2, max(ridge, *(x for x, _ in points)) * 2]
    roof = [(x, min(peak, x * bandwidth / 1e3)) for x in (ends[0], ridge, ends[1])]
    axes.plot(*zip(*roof, strict=True), color="#555555")
    for x, row in points:
        color, marker = LOOKS[row["provider"]]
        full = row["mode"] != "forward"
        axes.plot(
            x,
            row["teraflop_per_second"],
            color=color,
            marker=marker,
            markersize=8,
            markerfacecolor=color if full else "none",
            linestyle="",
            label=row["provider"],
        )
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel("operations / least bytes, FLOP/B (each column: one shape and mode)")
    axes.set_ylabel("TFLOP/s")
    device, dtype = rows[0]["device"], rows[0]["dtype"]
    axes.set_title(f"Measured on {device}, {dtype}; full: training step, hollow: forward")
    axes.grid(alpha=0.3)
    _legend(axes, axes)
    return figure


def draw_predicted(rows: Sequence[Row]) -> "Figure":
    """Predicted rates of the forward on each chip, in units of its own peaks: one roofline."""
    figure = _figure(9, 5)
    axes = figure.subplots()
    axes.plot([0, 1, 3], [0, 1, 1], color="#555555")
    axes.annotate("bandwidth", (0.42, 0.42), (0.36, 0.46), rotation=56, color="#555555")
    axes.annotate("dense tensor-core peak", (1, 1), (1.9, 1.015), color="#555555")
    ways = {
        "fused_us": ("ours-triton", "pool + linear + GELU, fused"),
        "pool_cublaslt_us": ("cublaslt-epilogue", "pool, then cuBLASLt"),
    }
    chips = [CHIPS[row["chip"]] for row in rows]
    at = [FORWARD_FLOPS / FORWARD_BYTES * chip.dram_tb_s / chip.bf16_tflops for chip in chips]
    for row, chip, x in zip(rows, chips, at, strict=True):
        rates = [FORWARD_FLOPS / float(row[way]) / 1e6 / chip.bf16_tflops for way in ways]
        axes.plot([x, x], rates, color="#bbbbbb", linewidth=1, zorder=1)
        for rate, (provider, name) in zip(rates, ways.values(), strict=True):
            color, marker = LOOKS[provider]
            axes.plot(x, rate, color=color, marker=marker, markersize=9, linestyle="", label=name)
        # On the side where the next chip is farther away.
        right = min([o - x for o in at if o > x], default=9) > min(
            [x - o for o in at if o < x], default=9
        )
        place = {"xytext": (9 if right else -9, 0), "ha": "left" if right else "right"}
        middle = x, sum(rates) / len(rates)
        axes.annotate(chip.name, middle, textcoords="offset points", va="center", **place)
    axes.set(xlim=(0.3, 3), ylim=(0, 1.1))
    axes.set_xlabel("operations / least bytes, over the chip's ridge (left of 1: DRAM is the roof)")
    axes.set_ylabel("rate / dense peak")
    axes.set_title("Predicted, not measured: [64, 576, 1024] → [64, 144, 4096], bfloat16, forward")
    axes.grid(alpha=0.3)
    _legend(axes, axes, loc="lower right")
    return figure
