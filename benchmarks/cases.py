"""What is computed? The shapes, the modes, and what each costs at least."""

from typing import NamedTuple


class Mode(NamedTuple):
    """What is timed, and whether the vision tower trains and so wants the gradient of its tokens.

    ``what`` is "forward" (no gradients, as in inference), "backward" (of a forward that is not
    timed) or "step" (both).
    """

    what: str
    trained_tower: bool = False

    def __str__(self) -> str:
        tower = "-trained" if self.trained_tower else "-frozen"
        return self.what + tower * self.differentiates

    @property
    def differentiates(self) -> bool:
        return self.what != "forward"


MODES = (
    Mode("forward"),
    Mode("backward"),
    Mode("backward", trained_tower=True),
    Mode("step"),
    Mode("step", trained_tower=True),
)


class Shape(NamedTuple):
    """A projector and its tokens: ``batch`` images, or clips of ``frames`` images each.

    With ``class_token`` the tokens are read where a vision tower leaves them, behind its class
    token, and not copied: a strided view.
    """

    model: str
    side_in: int
    side_out: int
    channels: int
    features: int
    batch: int
    layers: int = 2
    frames: int = 1
    class_token: bool = False

    def __str__(self) -> str:
        return f"{self.model}-{self.side_in**2}-{self.side_out**2}-b{self.batch}"

    @property
    def images(self) -> int:
        return self.batch * self.frames

    @property
    def tokens(self) -> tuple[int, int, int]:
        return self.images, self.side_in**2, self.channels

    @property
    def output(self) -> tuple[int, int, int]:
        return self.images, self.side_out**2, self.features

    @property
    def regular(self) -> bool:
        """Whether every window has the same size and none overlap."""
        return self.side_in % self.side_out == 0

    def describe(self) -> str:
        view = ", strided" if self.class_token else ""
        plural = "s" if self.layers > 1 else ""
        return f"{[*self.tokens]} -> {[*self.output]}, {self.layers} layer{plural}{view}"

    def flops(self, mode: Mode) -> int:
        """Floating-point operations of the matrix products; pooling and GELU are not counted.

        With M = images * pooled tokens, K channels, N features and L layers, a forward has
        2 M K N + (L - 1) 2 M N N. A backward has twice the second term (gradients of weight and
        input) and the first once for the weight, and once more if the tower trains. A step is
        their sum.
        """
        rows = self.images * self.side_out**2
        first = 2 * rows * self.channels * self.features
        rest = 2 * rows * self.features**2 * (self.layers - 1)
        backward = first * (1 + mode.trained_tower) + 2 * rest
        return {"forward": first + rest, "backward": backward, "step": backward + first + rest}[
            mode.what
        ]

    def traffic(self, mode: Mode, itemsize: int) -> int:
        """Bytes that any implementation must move: each tensor once.

        With tokens X, parameters W, output Y and what is kept for backward, pooled tokens P and
        pre-activations Z of every layer but the last:

        * forward: reads X and W, writes Y;
        * backward: reads dY, P, Z and W, writes dW; W without the first layer if the tower is
          frozen, and if it trains writes dX too;
        * step: both, and writes P and Z.

        Hidden activations between two matrix products are not counted: a perfect one fuses them.
        """
        images, tokens_out, features = self.output
        rows, x = images * tokens_out, images * self.side_in**2 * self.channels
        first, rest = self.channels * features, features**2 * (self.layers - 1)
        w, y = first + rest + self.layers * features, rows * features
        kept = rows * self.channels + rows * features * (self.layers - 1)
        backward = y + kept + rest + w + mode.trained_tower * (first + x)
        elements = {"forward": x + w + y, "backward": backward, "step": x + w + y + kept + backward}
        return elements[mode.what] * itemsize


def _shapes() -> list[Shape]:
    """LLaVA-1.5; Gemma 3 with its one linear layer; SigLIP, 14 does not divide 27; one video."""
    llava = [
        Shape("llava", 24, side, 1024, 4096, batch) for side in (12, 8) for batch in (1, 8, 64)
    ]
    gemma = [Shape("gemma3", 64, 16, 1152, 2560, batch, layers=1) for batch in (1, 8)]
    siglip = [Shape("siglip", 27, side, 1152, 3584, batch) for side in (14, 9) for batch in (1, 8)]
    return [
        *llava,
        *gemma,
        *siglip,
        Shape("video", 24, 12, 1024, 4096, batch=1, frames=8, class_token=True),
    ]


SHAPES = tuple(_shapes())
