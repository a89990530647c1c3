"""How far off can a right result be? Bounds for every element, by running error analysis.

Tensors are carried as balls: true values, and radii that no computation leaves which rounds what it
stores to its dtype and sums in float32, in any order. All of it in float64, of which the own errors
are left out: they are millions of times smaller.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

Act = Callable[[torch.Tensor], torch.Tensor]

SUM = 2.0**-23  # of a float32 sum, an addition: tensor cores may cut where others round
TF32 = 2.0**-10  # what cutting a factor to TF32 may take away
BEND = 0.86  # at most: second derivatives of GELU (0.798), its tanh form, SiLU (0.5), quick (0.851)


class Chain(NamedTuple):
    """What a projector computes: ``pooling`` [M, N] of ``before(x)``, linear layers with GELUs.

    ``layers`` are weights and biases.
    """

    pooling: torch.Tensor
    layers: list[tuple[torch.Tensor, torch.Tensor | None]]
    before: Act | None = None


class Ball(NamedTuple):
    value: torch.Tensor
    radius: torch.Tensor

    @property
    def most(self) -> torch.Tensor:
        """The largest magnitude within."""
        return self.value.abs() + self.radius

    @property
    def T(self) -> "Ball":
        return Ball(self.value.mT, self.radius.mT)


class Arithmetic(NamedTuple):
    """The roundings of tensors of a dtype, and of the factors of its products."""

    unit: float
    least: float  # what rounding a subnormal number changes
    cut: float

    @classmethod
    def of(cls, dtype: torch.dtype) -> "Arithmetic":
        unit = torch.finfo(dtype).eps / 2
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        cut = TF32 if dtype == torch.float32 and tf32 else 0.0
        return cls(unit, torch.finfo(dtype).smallest_normal * unit, cut)

    def stored(self, ball: Ball) -> Ball:
        return ball._replace(radius=ball.radius + self.unit * ball.most + self.least)

    def product(self, a: Ball, b: Ball, terms: int, cut: float | None = None) -> Ball:
        """``a @ b``, of so many terms an element."""
        most = a.most @ b.most
        cut = 2.01 * (self.cut if cut is None else cut)
        radius = most - a.value.abs() @ b.value.abs() + (SUM * (terms + 2) + cut) * most
        return Ball(a.value @ b.value, radius)

    def linear(self, a: Ball, weight: torch.Tensor, bias: torch.Tensor | None) -> Ball:
        """Maybe stored before the bias is added, maybe added to the bias."""
        n = weight.shape[1]
        z = self.stored(self.product(a, exact(weight).T, n))
        if bias is not None:
            bias = bias.double()
            z = Ball(z.value + bias, z.radius + SUM * n * bias.abs())
        return self.stored(z)

    def activation(self, z: Ball, act: Act | None) -> tuple[Ball, Ball | None]:
        """``act(z)`` and its derivative, evaluated within 4 roundings of |z| (1 + |z|)."""
        if act is None:
            return z, None
        at = z.value.detach().requires_grad_()
        with torch.enable_grad():
            y = act(at)
            (slope,) = torch.autograd.grad(y.sum(), at)
        own = 4 * self.unit * (1 + z.most)
        radius = slope.abs() * z.radius + BEND / 2 * z.radius**2 + own * z.most
        return self.stored(Ball(y.detach(), radius)), Ball(slope, BEND * z.radius + own)

    def times(self, a: Ball, b: Ball) -> Ball:
        value = a.value * b.value
        return self.stored(Ball(value, a.most * b.most - value.abs()))


def exact(t: torch.Tensor) -> Ball:
    value = t.detach().double()
    return Ball(value, torch.zeros_like(value))


def averages(grid_in: tuple[int, int], grid_out: tuple[int, int]) -> torch.Tensor:
    """The matrix of adaptive average pooling."""
    n = grid_in[0] * grid_in[1]
    tokens = torch.eye(n, dtype=torch.double).view(n, *grid_in)
    return F.adaptive_avg_pool2d(tokens, grid_out).flatten(1).T


@torch.no_grad()
def bounds(chain: Chain, x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    """Of the output, whose gradient is ``dy``, and of the gradients of x, weights and biases."""
    do = Arithmetic.of(dy.dtype)
    pooling = chain.pooling.to(x.device, torch.double)
    window, readers = (int((pooling != 0).sum(axis).max()) for axis in (1, 0))
    pooling = Ball(pooling, do.unit * pooling)  # the weights are rounded, too

    tokens, slope = do.activation(exact(x), chain.before)
    y = do.stored(do.product(pooling, tokens, window, cut=0.0))
    inputs, slopes = [y], [slope]
    for weight, bias in chain.layers:
        y = do.linear(inputs[-1], weight, bias)
        g, slope = do.activation(y, F.gelu)
        inputs.append(g)
        slopes.append(slope)

    radii = []
    dz = exact(dy)
    for i, (weight, bias) in reversed([*enumerate(chain.layers)]):
        flat, a = (Ball(*(t.flatten(0, 1) for t in ball)) for ball in (dz, inputs[i]))
        rows = len(flat.value)
        if bias is not None:
            ones = exact(torch.ones(1, rows, device=x.device))
            radii.append(do.stored(do.product(ones, flat, rows, cut=0.0)).radius[0])
        radii.append(do.stored(do.product(flat.T, a, rows)).radius)
        dz = do.stored(do.product(dz, exact(weight), len(weight)))
        if i:
            dz = do.times(dz, slopes[i])
    dx = do.stored(do.product(pooling.T, dz, readers, cut=0.0))
    if chain.before is not None:
        dx = do.times(dx, slopes[0])
    return [y.radius, dx.radius, *reversed(radii)]
