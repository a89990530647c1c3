"""What is asked of a verb? As much of it as decides who is fastest."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .work import Shape

PANEL = 128  # rows, which all tiles divide or are


class Call(NamedTuple):
    """A call of a verb; calls that are alike are equal.

    Attributes:
        verb: "pool_linear" or "dact_linear".
        dtype: of the product; float32 is TF32.
        rows: of the product, rounded up to whole panels of 128.
        compression: tokens before pooling for one after it, rounded to tenths; 0 without pooling.
        window: tokens pooled into one, at most; 0 without pooling.
        channels: what the product sums over.
        features: columns of the product.
        activation: whether a GELU follows, or comes before.
        act: what is applied to the tokens before they are pooled.
    """

    verb: str
    dtype: torch.dtype
    rows: int
    compression: float
    window: int
    channels: int
    features: int
    activation: bool
    act: str | None = None

    @classmethod
    def pool_linear(
        cls,
        x: Sequence[int],
        table: Sequence[int],
        w: Sequence[int],
        dtype: torch.dtype,
        activation: bool,
        act: str | None = None,
    ) -> "Call":
        """For tokens of shape [B, n_in, K], a gather table [n_out, T] and a weight [N, K]."""
        (batch, tokens_in, channels), (tokens_out, window), (features, _) = x, table, w
        rows, compression = _panels(batch * tokens_out), round(tokens_in / tokens_out, 1)
        sizes = rows, compression, window, channels, features
        return cls("pool_linear", dtype, *sizes, activation, act)

    @classmethod
    def dact_linear(cls, rows: int, w: Sequence[int], dtype: torch.dtype) -> "Call":
        """For a gradient with so many rows and a weight [K, N]."""
        return cls("dact_linear", dtype, _panels(rows), 0.0, 0, *w, True)

    def bucket(self) -> "Call":
        """With so many rows as a measurement stands for: a power of two."""
        return self._replace(rows=1 << (self.rows - 1).bit_length())

    def shape(self) -> Shape:
        """For the cost model, which wants sizes that 16 divides."""
        rows, tokens_in = self.rows, round(self.rows * self.compression)
        channels, features = (-(-n // 16) * 16 for n in (self.channels, self.features))
        reads = max(tokens_in, rows * (self.window if self.compression >= 1 else 1))
        return Shape(1, tokens_in, rows, self.window, reads, channels, features, self.dtype)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        name = "tf32" if self.dtype == torch.float32 else name
        pooling = f", {self.compression:g} tokens to one" if self.window else ""
        gelu = f" of {self.act}" if self.act else " and gelu" if self.activation else ""
        sizes = f"[{self.rows}, {self.channels}] -> [{self.rows}, {self.features}]"
        return f"{self.verb}{gelu} {name} {sizes}{pooling}"


def _panels(rows: int) -> int:
    """Up to whole panels, and at least one."""
    return max(1, -(-rows // PANEL)) * PANEL
