"""What is the task? Naming the digit in one cell of a canvas of scanned handwritten digits."""

from dataclasses import dataclass

import torch

SIDE = 3  # digits along one side of a canvas
SCAN = 8  # pixels along one side of a scan
HELD_OUT = 450  # of the 1797 scans
CHANCE = 0.1  # accuracy of guessing: the ten digits are about equally frequent

VOCABULARY = [*"0123456789", "row", "column", "?"]
QUESTION_LENGTH = 5  # "row" "2" "column" "3" "?"


@dataclass(frozen=True)
class Scans:
    """Scanned digits: ``pixels [n, SCAN, SCAN]`` between -1 and 1, and their ``labels [n]``."""

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
        return Batch(self.images.to(device), self.questions.to(device), self.answers.to(device))


def load_scans() -> tuple[Scans, Scans]:
    """scikit-learn's handwritten digits: the scans to train on, and others to test with."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(digits.target, dtype=torch.long)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test, train = order[:HELD_OUT], order[HELD_OUT:]
    return Scans(pixels[train], labels[train]), Scans(pixels[test], labels[test])


def draw_batch(scans: Scans, canvases: int, generator: torch.Generator) -> Batch:
    """Compose ``canvases`` of random scans, and ask for every cell of each in random order."""
    chosen = torch.randint(len(scans.labels), (canvases, SIDE, SIDE), generator=generator)
    images = scans.pixels[chosen].transpose(2, 3).reshape(canvases, SIDE * SCAN, SIDE * SCAN)
    cells = torch.rand(canvases, SIDE * SIDE, generator=generator).argsort(dim=1)

    questions = torch.empty(*cells.shape, QUESTION_LENGTH, dtype=torch.long)
    questions[..., 0] = VOCABULARY.index("row")
    questions[..., 1] = cells // SIDE + 1  # the token of a digit is the digit
    questions[..., 2] = VOCABULARY.index("column")
    questions[..., 3] = cells % SIDE + 1
    questions[..., 4] = VOCABULARY.index("?")
    return Batch(images, questions, scans.labels[chosen].flatten(1).gather(1, cells))


def spell(tokens: torch.Tensor) -> str:
    """The words of ``tokens [length]``, such as ``"row 2 column 3 ?"``."""
    return " ".join(VOCABULARY[token] for token in tokens.tolist())
