"""Is it right here? Output and every gradient against float64, beside eager torch's own error."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from .backends import unusable
from .projector import FusedAvgPoolProjector
from .reference import AvgPoolProjector


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


# Triton hands float32 to the tensor cores as it is, and they cut it to TF32; cuBLAS may round it.
TF32_SLACK = 3.0


class Error(NamedTuple):
    """Largest absolute error of one tensor against float64; ``ulp`` is one of its dtype's there."""

    name: str
    ours: float
    eager: float
    ulp: float

    def within(self, slack: float = 1.0) -> bool:
        """Whether ours is at most ``slack`` times eager's, + 1 ulp."""
        return self.ours <= slack * self.eager + self.ulp


def errors(
    fused: torch.nn.Module, oracle: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor
) -> list[Error]:
    """Errors of output and gradients of ``fused`` and ``oracle``, modules with equal parameters."""
    truth = copy.deepcopy(oracle).double()
    names = ["output", "x", *(name for name, _ in oracle.named_parameters())]
    runs = _run(fused, x, dy), _run(oracle, x, dy), _run(truth, x.double(), dy.double())
    return [_error(name, *tensors) for name, *tensors in zip(names, *runs, strict=True)]


def _run(module: torch.nn.Module, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], dy)]


def _error(name: str, ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> Error:
    def worst(t: torch.Tensor) -> float:  # NaN counts as infinite
        return (t.double() - truth).abs().nan_to_num(nan=float("inf")).max().item()

    exponent = torch.frexp(truth.abs().max()).exponent.item() - 1
    ulp = torch.finfo(ours.dtype).eps * 2.0**exponent
    return Error(name, worst(ours), worst(eager), ulp)


def case_errors(
    case: Case, dtype: torch.dtype, device: torch.device, backend: str, seed: int = 0
) -> list[Error]:
    """The errors of a fused projector in one case, on random data."""
    batch, side, query_num, channels, features, layers, strided = case
    r = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r).to(device, dtype)

    torch.manual_seed(seed)
    oracle = AvgPoolProjector(layers, query_num, channels, features).to(device, dtype)
    fused = FusedAvgPoolProjector.from_reference(oracle, backend=backend)
    x = randn(batch, side * side + strided, channels)[:, int(strided) :]
    return errors(fused, oracle, x, randn(batch, query_num, features))


@contextmanager
def float32_matmul(precision: str) -> Iterator[None]:
    """Torch's float32 matrix products by "ieee" rules or in "tf32"."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def run(backend: str = "auto", device: str | None = None) -> bool:
    """Check every case in every dtype that ``backend`` takes on ``device``; prints a table.

    Returns:
        Whether every error is within the bar.

    Raises:
        RuntimeError: ``backend`` cannot run there at all.
    """
    place = torch.device(device or ("cuda:0" if torch.cuda.is_available() else "cpu"))
    kinds = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
    if place.type == "cuda":
        kinds["tf32"] = torch.float32
    print(f"{backend} on {place}; largest error against float64, ours / eager torch's")
    problems, good = {}, True
    for label, dtype in kinds.items():
        problem = None if backend == "auto" else unusable(backend, place, dtype)
        if problem:
            print(f"skip {label}: {problem}")
            problems[label] = problem
            continue
        for case in CASES:
            with float32_matmul("tf32" if label == "tf32" else "ieee"):
                found = case_errors(case, dtype, place, backend)
            slack = TF32_SLACK if label == "tf32" else 1.0
            ok = all(e.within(slack) for e in found)
            good &= ok
            print(f"{'ok  ' if ok else 'FAIL'} {label:8} {case}")
            for e in found:
                mark = " " if e.within(slack) else "!"
                print(f"     {mark}{e.name:24} {e.ours:.2e} / {e.eager:.2e}")
    if len(problems) == len(kinds):
        raise RuntimeError(f"backend {backend!r} cannot run here: {problems['float32']}")
    verdict = "all right" if good else "WRONG"
    print(f"{verdict} (bar: eager's error, for tf32 {TF32_SLACK} times that, + 1 ulp)")
    return good
