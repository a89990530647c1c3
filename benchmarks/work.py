"""What exactly is run? Tensors of a case, the calls that are timed, and that they compute right."""

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import NamedTuple

import torch
from cases import Mode, Shape

from deco_kernels import AvgPoolProjector

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")


def _dtype() -> torch.dtype:
    if DEVICE.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(DEVICE) >= (8, 0) else torch.float16


DTYPE = _dtype()
Module = Callable[[torch.Tensor], torch.Tensor]


class Work(NamedTuple):
    """The oracle, whose parameters all providers share, random tokens, and a gradient of output."""

    oracle: AvgPoolProjector
    x: torch.Tensor
    dy: torch.Tensor


@lru_cache(maxsize=1)
def work(shape: Shape, dtype: torch.dtype = DTYPE) -> Work:
    """Keeps one, so ask for all that is wanted of a shape in a row."""
    torch.manual_seed(0)
    with DEVICE:
        oracle = AvgPoolProjector(
            shape.layers, shape.side_out**2, shape.channels, shape.features
        ).to(dtype)
        images, tokens, channels = shape.tokens
        hidden = torch.randn(images, tokens + shape.class_token, channels, dtype=dtype)
        dy = torch.randn(shape.output, dtype=dtype)
    return Work(oracle, hidden[:, int(shape.class_token) :], dy)


class Job(NamedTuple):
    """A call to time: ``run(*prepare())``, where ``prepare`` is not timed."""

    prepare: Callable[[], tuple]
    run: Callable[..., object]

    def __call__(self) -> object:
        return self.run(*self.prepare())


def job(module: Module, shape: Shape, mode: Mode) -> Job:
    """``module`` on the tokens of ``shape``; its result is the output, or all gradients."""
    oracle, x, dy = work(shape)
    x = x.detach().requires_grad_(mode.trained_tower)
    leaves = [p for p in (x, *oracle.parameters()) if p.requires_grad]

    def new_step() -> tuple:
        # What mode "max-autotune" compiles may now reuse the memory of the results before.
        torch.compiler.cudagraph_mark_step_begin()
        return ()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return module(x)

    def output() -> tuple[torch.Tensor]:
        new_step()
        return (module(x),)

    def backward(y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(y, leaves, dy)

    jobs = {
        "forward": Job(new_step, forward),
        "backward": Job(output, backward),
        "step": Job(new_step, lambda: backward(module(x))),
    }
    return jobs[mode.what]


@lru_cache(maxsize=1)
def _expected(shape: Shape, mode: Mode) -> list[torch.Tensor]:
    return _tensors(job(work(shape).oracle, shape, mode)())


def check(run: Job, shape: Shape, mode: Mode) -> None:
    """Fail if ``run`` does not compute what the oracle does: it may look fast for being wrong.

    Errors count relative to a tensor's largest element. How exact a provider is, is another
    question, which ``python -m deco_kernels check`` answers.
    """
    expected, found = _expected(shape, mode), _tensors(run())
    assert len(found) == len(expected)
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape
        error = ((got - want).abs().max() / want.abs().max()).item()
        assert error <= TOLERANCE, f"off by {error:.1e} of the largest element of {[*want.shape]}"


# Four roundings of the dtype, and sums of thousands in another order.
TOLERANCE = 4 * torch.finfo(DTYPE).eps + 1e-5


def _tensors(result: torch.Tensor | Iterable[torch.Tensor]) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)
