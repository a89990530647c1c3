"""How fast should it be? Times, what "auto" does, assumptions, and where a gain is gone."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import torch

from ..kernels.launch import Config
from ..tuning.call import Call
from ..tuning.chips import CHIPS, ChipFigures
from ..tuning.decide import predicted
from ..tuning.predict import Assumptions, Predictor
from ..tuning.table import config_for, refused_for
from ..tuning.work import Shape

HELP = "predicted times on chips, and what is assumed for them"
GAIN = 1.02  # below this, a gain is called gone
BATCHES = (1, 8, 64)
_MODEL = Predictor.__module__


def holding(
    chip: ChipFigures, given: Assumptions, shape: Shape, config: Config, name: str
) -> list[tuple[float, float]]:
    """Where, in its range, one assumption keeps the gain over pool + cuBLASLt at GAIN or more."""
    lowest, highest = Assumptions.__dataclass_fields__[name].metadata["range"]

    def gains(value: float) -> bool:
        changed = replace(given, **{name: value})
        return Predictor(chip, changed).gain(shape, config) >= GAIN

    points = [lowest + (highest - lowest) * i / 40 for i in range(41)]
    edges = [_bisect(gains, a, b) for a, b in pairwise(points) if gains(a) != gains(b)]
    edges = [lowest] * gains(lowest) + edges + [highest] * gains(highest)
    return list(zip(edges[::2], edges[1::2], strict=True))


def _bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Where ``holds`` changes; it differs at ``low`` and ``high``."""
    at_low = holds(low)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) == at_low else (low, middle)
    return (low + high) / 2


def _sensitivity(chip: ChipFigures, given: Assumptions, shape: Shape, config: Config) -> str:
    """At which single changes of an assumption the gain comes or goes."""
    told = []
    for each in fields(Assumptions):
        found = holding(chip, given, shape, config, each.name)
        if found and found != [each.metadata["range"]]:
            ranges = " or ".join(f"{low:.3g} to {high:.3g}" for low, high in found)
            told.append(f"{each.name} {ranges}")
    gain = Predictor(chip, given).gain(shape, config)
    otherwise = "any single change" if gain >= GAIN else "no single change"
    return f"gain {gain:.2f}; {GAIN} or more with {', '.join(told) or otherwise}"


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(map(str.ljust, row, widths)).rstrip()


def _decisions(chips: Sequence[str], given: Assumptions) -> Iterator[tuple[str, ...]]:
    """Who is fastest at either verb of LLaVA-1.5's projector, by the model."""
    verbs = ("pool + linear + GELU", "backward of GELU + linear")
    yield (
        "chip",
        "images",
        *(c for v in verbs for c in (f"{v}: fused", "composed", "eager", "auto")),
    )
    for chip in chips:
        for images in BATCHES:
            tokens, w = (images, 576, 1024), (4096, 1024)
            row = [chip, str(images)]
            for call in (
                Call.pool_linear(tokens, (144, 4), w, torch.bfloat16, True),
                Call.dact_linear(images * 144, (4096, 4096), torch.bfloat16),
            ):
                times = predicted(CHIPS[chip], "triton", call, given)
                row += [f"{us:.1f}" for us in times.values()] + [min(times, key=times.__getitem__)]
            yield tuple("fused" if cell == "triton" else cell for cell in row)


def report(chips: Sequence[str] = tuple(CHIPS), batch: int = 64, **given: float) -> str:
    """The tables that ``python -m deco_kernels predict`` prints.

    Args:
        chips: names, of :data:`~.chips.CHIPS`.
        batch: images.
        given: fields of :class:`Assumptions`.

    Raises:
        KeyError: no such chip.
        ValueError: no images, or an assumption that is not positive.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    assumed = Assumptions(**given)
    shape = Shape.adaptive(batch, (24, 24), (12, 12), 1024, 4096)
    head = "chip,config,fused,limit,pool+Lt,gain,step,eager,gain,compile,gain"
    times, sensitivity, configs = [head.split(",")], [], []
    for chip in map(CHIPS.__getitem__, chips):
        predictor = Predictor(chip, assumed)
        key = "pool_linear", shape.dtype, chip.arch
        rows = [("shipped", config_for(*key), "")]
        rows += [("refused", each.config, each.reason) for each in refused_for(*key)[:1]]
        others = [predictor.torch_step(shape, compiled) for compiled in (False, True)]
        for name, config, reason in rows:
            configs.append((chip.name, name, str(config), reason))
            fused, limit = predictor.fused_forward(shape, config)
            composed, step = predictor.peer_forward(shape), predictor.fused_step(shape, config)
            row = [chip.name, name, f"{fused:.1f}", limit]
            row += [f"{composed:.1f}", f"{composed / fused:.2f}", f"{step:.0f}"]
            for other in others:
                row += [f"{other:.0f}", f"{other / step:.2f}"]
            times.append(row)
            text = _sensitivity(chip, assumed, shape, config)
            sensitivity.append((chip.name, name, text))
    assumptions = [
        (each.name, f"{getattr(assumed, each.name):g}", each.metadata["help"])
        for each in fields(Assumptions)
    ]
    published = [tuple(each.name for each in fields(ChipFigures))]
    published += [tuple(f"{v}" for v in vars(CHIPS[name]).values()) for name in chips]
    return "\n".join(
        [
            f"Predicted microseconds, by the roofline of {_MODEL}: nothing was measured.",
            f"[{batch}, 576, 1024] -> [{batch}, 144, 4096], bfloat16. fused: pool + linear + GELU;",
            "pool+Lt: pool, then cuBLASLt; step: forward and backward of two layers, tower frozen.",
            *("", *_aligned(times)),
            *(
                "",
                'What "auto" takes where `tune` has measured nothing, [images, 576, 1024] as above',
                *_aligned(list(_decisions(chips, assumed))),
            ),
            *(
                "",
                "Tiles (refused: the fastest by this model, which the compiler does not let ship)",
                *_aligned(configs),
            ),
            *("", "Assumptions, each a flag", *_aligned(assumptions)),
            *("", "Published figures, dense", *_aligned(published)),
            *("", f"Where the gain over pool+Lt stays ({GAIN} or more), one assumption changed"),
            *_aligned(sensitivity),
        ]
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    text = f"of {', '.join(CHIPS)}; default: all"
    how = {"nargs": "+", "type": str.upper, "choices": CHIPS, "metavar": "NAME"}
    parser.add_argument("--chip", dest="chips", help=text, **how)
    parser.add_argument("--batch", type=int, help="images; default: 64")
    for each in fields(Assumptions):
        text = f"{each.metadata['help']}; default: {each.default:g}"
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=float, metavar="X", help=text)


def main(**options: Any) -> int:
    print(report(**options))
    return 0
