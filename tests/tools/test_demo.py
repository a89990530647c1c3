"""Does the demo train both models on the same data, and learn?"""

import importlib.util

import pytest
import torch

from deco_kernels.tools import demo
from deco_kernels.tools.demo import data, train


def test_a_few_steps(tmp_path, capsys):
    picture = tmp_path / "demo.png"
    result = demo.run(picture, steps=3, device="cpu")
    printed = capsys.readouterr().out
    assert "AvgPoolProjector" in printed
    assert "chance is 10%" in printed
    assert "path fused" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(result.fused.losses) == 3
    assert result.fused.losses == pytest.approx(result.reference.losses, rel=1e-4)
    assert result.fused.saved_bytes < 0.5 * result.reference.saved_bytes


def test_held_out_canvases_are_of_other_scans():
    trained, held_out = data.load_scans()
    both = torch.cat([trained.pixels, held_out.pixels]).flatten(1)
    assert len(both) == 1797
    seen = {tuple(scan.tolist()) for scan in trained.pixels.flatten(1)}
    assert not any(tuple(scan.tolist()) in seen for scan in held_out.pixels.flatten(1))


def test_answers_are_the_digits_in_the_cells():
    scans, _ = data.load_scans()
    batch = data.draw_batch(scans, 2, torch.Generator().manual_seed(0))
    labels = {
        tuple(p.flatten().tolist()): int(n) for p, n in zip(*vars(scans).values(), strict=True)
    }
    for image, questions, answers in zip(batch.images, batch.questions, batch.answers, strict=True):
        for question, answer in zip(questions, answers, strict=True):
            _, row, _, column, _ = data.spell(question).split()
            y, x = data.SCAN * (int(row) - 1), data.SCAN * (int(column) - 1)
            cell = image[y : y + data.SCAN, x : x + data.SCAN]
            assert labels[tuple(cell.flatten().tolist())] == answer


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        demo.run(tmp_path / "demo.png", steps=0)
    with pytest.raises(ValueError, match="out must be a file in a folder that exists"):
        demo.run(tmp_path / "nowhere" / "demo.png")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        train.importlib.util, "find_spec", lambda name: None if name == "sklearn" else real(name)
    )
    with pytest.raises(
        RuntimeError, match=r'needs scikit-learn: pip install "deco_kernels\[demo\]"'
    ):
        demo.run(tmp_path / "demo.png")


@pytest.mark.slow
def test_it_learns(tmp_path):
    result = demo.run(tmp_path / "demo.png", device="cpu")
    assert result.fused.accuracy > 0.85
    assert result.fused.losses == pytest.approx(result.reference.losses, rel=0.05, abs=0.05)
