"""Is it right here? Output and every gradient against float64, beside eager torch's own error."""

import argparse
import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ...backends import BACKENDS, unusable
from ...host import library
from ...kernels.launch import chip_of
from ...projector import FusedAvgPoolProjector
from ...reference import AvgPoolProjector
from ..arguments import where
from ..measure import float32_matmul
from .bounds import Chain, averages, bounds

HELP = "forward and every gradient against float64"


class Case(NamedTuple):
    """A projector and its tokens, which may be a strided view."""

    batch: int
    side: int
    query_num: int
    mm_hidden_size: int
    llm_hidden_size: int
    layer_num: int = 2
    strided: bool = False

    def __str__(self) -> str:
        b, n, q, k, h, layers, strided = self
        view = " strided" if strided else ""
        return f"[{b}, {n * n}, {k}] -> [{b}, {q}, {h}], {layers} layers{view}"


CASES = (
    Case(2, 24, 144, 256, 512),
    Case(2, 24, 64, 256, 512, strided=True),
    Case(3, 27, 196, 144, 264, layer_num=1),
    Case(1, 7, 9, 80, 136, layer_num=3),
    Case(5, 4, 36, 64, 64),
)

SEEDS = range(8)
SLACK = 1.1
# Triton hands float32 to the tensor cores as it is, and they cut it to TF32; cuBLAS may round it.
# The second moment of what is lost is then 1/3 in place of 1/12 of an ulp's square, and its mean,
# half an ulp, adds up over the two factors: 7/6 against 1/6, a ratio of sqrt(7) in the root.
TF32_SLACK = 7**0.5 * SLACK


class Error(NamedTuple):
    """What is wrong with a tensor, against float64: the root mean square over its elements.

    A largest error is no measure: it is drawn anew by every processor's order of summation. What
    is proven of it is that it stays within :func:`bounds.bounds`: ``largest`` is the largest of
    ours, as a share of that. A NaN is an infinite error.
    """

    name: str
    count: int  # of elements, in all draws
    ours: float
    eager: float
    floor: float  # half an ulp, in the tensor's dtype, of the root mean square of the true values
    largest: float = 0.0

    def bar(self, slack: float = SLACK) -> float:
        """What ours may be at most: ``slack`` times eager's, and the floor.

        The ratio of two root mean squares of n numbers each is known to 1 / sqrt(n).
        """
        return slack * (1 + 3 / self.count**0.5) * self.eager + self.floor

    def within(self, slack: float = SLACK) -> bool:
        return self.ours <= self.bar(slack) and self.largest <= 1


def errors(
    fused: torch.nn.Module,
    oracle: torch.nn.Module,
    x: torch.Tensor,
    dy: torch.Tensor,
    chain: Chain | None = None,
) -> list[Error]:
    """Errors of output and gradients of ``fused`` and ``oracle``, modules with equal parameters.

    ``chain`` says what they compute, for a bound of the largest.
    """
    truth = copy.deepcopy(oracle).double()
    names = ["output", "x", *(name for name, _ in oracle.named_parameters())]
    runs = step(fused, x, dy), step(oracle, x, dy), step(truth, x.double(), dy.double())
    radii = bounds(chain, x, dy) if chain else [None] * len(names)
    return [error(name, *tensors) for name, *tensors in zip(names, *runs, radii, strict=True)]


def step(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of the tokens and the parameters."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def error(
    name: str,
    ours: torch.Tensor,
    eager: torch.Tensor,
    truth: torch.Tensor,
    radius: torch.Tensor | None = None,
) -> Error:
    """The error of one tensor; ``radius`` is what is proven of its elements' errors."""

    def off(t: torch.Tensor) -> torch.Tensor:
        return (t.double() - truth).abs().nan_to_num(nan=torch.inf)

    def rms(t: torch.Tensor) -> float:
        return t.square().mean().sqrt().item()

    assert ours.shape == eager.shape == truth.shape, (name, ours.shape, eager.shape, truth.shape)
    found = off(ours)
    half_ulp = torch.finfo(eager.dtype).eps / 2
    largest = 0.0 if radius is None else (found / radius).max().item()
    count = truth.numel()
    return Error(name, count, rms(found), rms(off(eager)), half_ulp * rms(truth), largest)


def over(draws: Iterable[Sequence[Error]]) -> list[Error]:
    """The errors of several draws as one."""

    def rms(values: Sequence[float]) -> float:
        return (sum(v * v for v in values) / len(values)) ** 0.5

    columns = [[*zip(*found, strict=True)] for found in zip(*draws, strict=True)]
    return [
        Error(names[0], sum(counts), *map(rms, (ours, eager, floor)), max(largest))
        for names, counts, ours, eager, floor, largest in columns
    ]


class Draw(NamedTuple):
    """Modules with equal parameters, tokens and the output's gradient; what is computed."""

    fused: FusedAvgPoolProjector
    oracle: AvgPoolProjector
    x: torch.Tensor
    dy: torch.Tensor
    chain: Chain


def draw(case: Case, dtype: torch.dtype, device: torch.device, backend: str, seed: int) -> Draw:
    batch, side, query_num, channels, features, layers, strided = case
    r = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r).to(device, dtype)

    torch.manual_seed(seed)
    oracle = AvgPoolProjector(layers, query_num, channels, features).to(device, dtype)
    fused = FusedAvgPoolProjector.from_reference(copy.deepcopy(oracle), backend=backend)
    x = randn(batch, side * side + strided, channels)[:, int(strided) :]
    pooling = averages((side, side), (int(query_num**0.5),) * 2)
    chain = Chain(pooling, [(m.weight, m.bias) for m in oracle.mlp_projector[::2]])
    return Draw(fused, oracle, x, randn(batch, query_num, features), chain)


def case_errors(
    case: Case, dtype: torch.dtype, device: torch.device, backend: str, seeds: Iterable[int]
) -> list[Error]:
    """The errors of a fused projector in one case, on random data."""
    return over(errors(*draw(case, dtype, device, backend, seed)) for seed in seeds)


def _kinds(place: torch.device) -> dict[str, torch.dtype]:
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    return kinds | ({"tf32": torch.float32} if place.type == "cuda" else {})


def _not_built(backend: str, place: torch.device) -> str | None:
    if backend != "cuda" or library.standing_in() or library.built(chip_of(place).arch):
        return None
    return "its library is not built yet, and --backend cuda builds it"


def _skipped(backend: str, problems: dict[str, str | None]) -> Iterator[str]:
    """What is not checked and why: a line, if all dtypes have the same reason."""
    if len(set(problems.values())) == 1:
        problems = {"": problems.popitem()[1]}
    for label, problem in problems.items():
        if problem:
            yield f"skip {' '.join([backend, label]).strip()}: {problem}"


def _line(e: Error, slack: float) -> str:
    bar = f"{e.ours:.2e} / {e.eager:.2e}, bar {e.bar(slack):.2e}"
    return f"{e.name:22} {bar}; largest {e.largest:.1%}"


def arguments(parser: argparse.ArgumentParser) -> None:
    where(parser)


def main(**options: Any) -> int:
    return 0 if run(**options) else 1


def run(backend: str | None = None, device: str | None = None) -> bool:
    """Check every case in every dtype and by every backend usable on ``device``, or by one.

    Prints a line for each, of its worst tensor, and all tensors of those that are wrong.

    Returns:
        Whether every error is within its bars.

    Raises:
        RuntimeError: ``backend`` cannot run there at all.
    """
    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    kinds, good = _kinds(place), True
    print(
        f"On {place}, {len(SEEDS)} draws a case. Root mean square error against float64, ours /"
        " eager torch's; the largest, of what rounding can do at most; of the worst tensor"
    )
    for name in [backend] if backend else BACKENDS[1:]:
        problems = dict.fromkeys(kinds)
        if name != "auto":
            problems = {label: unusable(name, place, dtype) for label, dtype in kinds.items()}
        if backend and all(problems.values()):
            raise RuntimeError(f"backend {backend!r} cannot run here: {problems['float32']}")
        if not backend and not all(problems.values()) and (reason := _not_built(name, place)):
            problems = dict.fromkeys(kinds, reason)
        for line in _skipped(name, dict(problems)):
            print(line)
        for label, dtype in kinds.items():
            for case in () if problems[label] else CASES:
                good &= _right(name, label, dtype, case, place)
    print(
        f"{'all right' if good else 'WRONG'} (bars: {SLACK} times eager's error, for tf32"
        f" {TF32_SLACK:.1f} times, + half an ulp; and 100%)"
    )
    return good


def _right(backend: str, label: str, dtype: torch.dtype, case: Case, place: torch.device) -> bool:
    with float32_matmul("tf32" if label == "tf32" else "ieee"):
        found = case_errors(case, dtype, place, backend, SEEDS)
    slack = TF32_SLACK if label == "tf32" else SLACK
    wrong = [e for e in found if not e.within(slack)]
    head = f"{'FAIL' if wrong else 'ok  '} {backend:8} {label:8} {case!s:53}"
    if wrong:
        print(head, *(f"    {_line(e, slack)}" for e in wrong), sep="\n", flush=True)
    else:
        print(head, _line(max(found, key=lambda e: e.ours / e.bar(slack)), slack), flush=True)
    return not wrong
