"""Does it train? Trains one tiny MLLM twice, with either projector, in turns."""

import copy
import importlib.util
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ...projector import FusedAvgPoolProjector
from ..measure import saved_bytes
from .data import Batch, draw_batch, load_scans
from .model import TinyMLLM
from .plot import draw
from .result import DemoResult, ModelResult

CANVASES = 16  # in a training batch
HELD_OUT_CANVASES = 256
LEARNING_RATE = 2e-3
MAX_GRAD_NORM = 1.0
PACKAGES = {"sklearn": "scikit-learn", "matplotlib": "matplotlib"}


def run(
    out: Path = Path("deco_demo.png"),
    steps: int = 800,
    seed: int = 0,
    device: str | None = None,
    backend: str = "auto",
) -> DemoResult:
    """Train the same model with either projector, print both side by side and draw them.

    Args:
        out: the picture to write.
        steps: optimizer steps of each training.
        seed: of the initial weights and the training batches, which both trainings share.
        device: where to train; default: a GPU if there is one, else the CPU.
        backend: of :class:`FusedAvgPoolProjector`.

    Raises:
        ValueError: ``steps`` is below 1, or ``out`` is a folder or in a folder that is not there.
        RuntimeError: a package that only the demo needs is missing.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if out.is_dir() or not out.parent.is_dir():
        raise ValueError(f"out must be a file in a folder that exists, got {out}")
    for module, package in PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            raise RuntimeError(f'the demo needs {package}: pip install "deco_kernels[demo]"')

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    reference_model, fused_model = _build(seed, where), _build(seed, where)

    # The swap. The fused projector shares the parameters of the one it replaces.
    projector = fused_model.projector
    fused_model.projector = FusedAvgPoolProjector.from_reference(projector, backend=backend)

    train_scans, test_scans = load_scans()
    held_out = draw_batch(test_scans, HELD_OUT_CANVASES, torch.Generator().manual_seed(0)).to(where)
    generator = torch.Generator().manual_seed(seed)
    trainers = reference, fused = [_Trainer(m, steps) for m in (reference_model, fused_model)]
    autocast = torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda")
    with _one_cpu_thread(), autocast:
        with tqdm(total=steps, desc=f"training both on {where}", unit="step") as bar:
            for step in range(steps):
                batch = draw_batch(train_scans, CANVASES, generator).to(where)
                for trainer in trainers if step % 2 else reversed(trainers):
                    trainer.step(batch)
                bar.set_postfix_str(f"loss {reference.losses[-1]:.3f} | {fused.losses[-1]:.3f}")
                bar.update()
        result = DemoResult(
            *(trainer.result(held_out) for trainer in trainers),
            held_out=held_out,
            device=str(where),
            path=str(fused_model.projector.explain(fused_model.tower(held_out.images))),
        )
    print(result)
    draw(result, out)
    print(f"wrote {out}")
    return result


@contextmanager
def _one_cpu_thread() -> Iterator[None]:
    """Small tensors gain little from more threads, and on a busy machine these wait in vain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _build(seed: int, device: torch.device) -> TinyMLLM:
    """The model with the initial weights of ``seed``; the caller's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TinyMLLM().to(device)


class _Trainer:
    """Trains one model, step by step, so that two can take turns on the same batches."""

    def __init__(self, model: TinyMLLM, steps: int) -> None:
        def warm_up_then_cosine(step: int) -> float:
            return min(10 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)

        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warm_up_then_cosine)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, batch: Batch) -> None:
        start = time.perf_counter()
        logits = self.model(batch.images, batch.questions)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.answers.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.schedule.step()
        self.losses.append(loss.item())  # waits for the GPU, so the time below is the step's
        self.seconds.append(time.perf_counter() - start)

    def result(self, held_out: Batch) -> ModelResult:
        with torch.no_grad():
            predictions = self.model(held_out.images, held_out.questions).argmax(-1)
        return ModelResult(
            name=type(self.model.projector).__name__,
            parameters=sum(p.numel() for p in self.model.parameters()),
            losses=self.losses,
            seconds=self.seconds,
            predictions=predictions,
            accuracy=(predictions == held_out.answers).float().mean().item(),
            saved_bytes=_saved_bytes_per_image(self.model, held_out.images[:CANVASES]),
        )


def _saved_bytes_per_image(model: TinyMLLM, images: torch.Tensor) -> int:
    """Bytes that the projector saves for backward when the vision tower is trained with it."""
    tokens = model.tower(images).detach().requires_grad_()
    # In the tokens' dtype, else autocast's copies of the weights would count as saved.
    projector = copy.deepcopy(model.projector).to(tokens.dtype)
    with torch.autocast(tokens.device.type, enabled=False):
        return saved_bytes(lambda: projector(tokens), projector.parameters()) // len(images)
