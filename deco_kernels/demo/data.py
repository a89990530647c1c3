"""What is the task? Naming the digit in one cell of a canvas of scanned handwritten digits."""

from dataclasses import dataclass

import torch

SIDE = 4  # digits along one side of a canvas
SCAN = 8  # pixels along one side of a scan
CHANCE = 0.1  # accuracy of always giving the same answer: the ten digits are about equally frequent

VOCABULARY = [*"0123456789", "row", "column", "?"]
_TOKEN = {word: token for token, word in enumerate(VOCABULARY)}
QUESTION_LENGTH = 5  # "row" "2" "column" "3" "?"


@dataclass(frozen=True)
class Scans:
    """Scanned digits: ``pixels [n, SCAN, SCAN]`` between 0 and 1, and their ``labels [n]``."""

    pixels: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """Canvases with questions on each of them.

    ``images [b, SIDE * SCAN, SIDE * SCAN]``; the questions' tokens ``questions
    [b, q, QUESTION_LENGTH]``; the tokens that answer them ``answers [b, q]``.
    """

    images: torch.Tensor
    questions: torch.Tensor
    answers: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            self.images.to(device), self.questions.to(device), self.answers.to(device)
        )


def load_scans() -> tuple[Scans, Scans]:
    """scikit-learn's 1797 handwritten digits, as scans to train on and 450 held-out ones."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    held_out, train = order[:450], order[450:]
    return Scans(pixels[train], labels[train]), Scans(pixels[held_out], labels[held_out])


def draw_batch(
    scans: Scans, canvases: int, questions: int, generator: torch.Generator, full: bool
) -> Batch:
    """Compose ``canvases`` of random scans and ask ``questions`` about the cells of each.

    A ``full`` canvas has a digit in every cell, another one has one in 1 to all of its cells;
    the questions go round the cells with a digit, in random order.
    """
    cells = SIDE * SIDE
    chosen = torch.randint(len(scans.labels), (canvases, cells), generator=generator)
    order = torch.rand(canvases, cells, generator=generator).argsort(1)
    filled = torch.randint(cells if full else 1, cells + 1, (canvases, 1), generator=generator)
    written = order.argsort(1) < filled
    pixels = scans.pixels[chosen] * written[..., None, None]
    images = pixels.unflatten(1, (SIDE, SIDE)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    asked = order.gather(1, torch.arange(questions) % filled)

    tokens = torch.empty(canvases, questions, QUESTION_LENGTH, dtype=torch.long)
    tokens[..., 0] = _TOKEN["row"]
    tokens[..., 1] = asked // SIDE + 1  # the token of a digit is the digit
    tokens[..., 2] = _TOKEN["column"]
    tokens[..., 3] = asked % SIDE + 1
    tokens[..., 4] = _TOKEN["?"]
    return Batch(images, tokens, scans.labels[chosen].gather(1, asked))


def spell(tokens: torch.Tensor) -> str:
    """The words of ``tokens [length]``, as in ``"row 2 column 3 ?"``."""
    return " ".join(VOCABULARY[token] for token in tokens.tolist())
