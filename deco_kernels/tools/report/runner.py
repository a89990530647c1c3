"""In which order? Step after step, and after each of them the report is written anew."""

import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import torch

from . import page, process
from .collect import Results, write
from .page import TITLE, Outcome
from .pictures import Pictures
from .plan import Step, checkout, plan

REPORT = "report.md"


def run(out: Path) -> int:
    """Run every step that can be run here, and write what comes of it to the folder ``out``.

    Returns:
        0; 1 if a step failed; 130 if the report was interrupted. What was done until then is kept.

    Raises:
        ValueError: ``out`` is a file, or a folder with other things than an earlier report.
    """
    from tqdm import tqdm

    steps = plan(torch.cuda.is_available())
    _claim(out, steps)
    with (
        tempfile.TemporaryDirectory() as scratch,
        process.terminated_as_interrupted(),
        tqdm(total=len(steps), unit="step") as bar,
    ):
        report = _Report(out, Path(scratch), {step: Outcome.before(step) for step in steps})
        try:
            for step in steps:
                bar.set_description(step.title)
                report.take(step)
                bar.update()
            bar.set_description("all steps")
        except KeyboardInterrupt:
            report.interrupted = True
        report.write()
    print(f"{report.verdict()}: {out / REPORT}")
    return 130 if report.interrupted else int(bool(report.failed()))


def _claim(out: Path, steps: list[Step]) -> None:
    """Make ``out``, or delete from it what an earlier report wrote."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}")
    out.mkdir(parents=True, exist_ok=True)
    if not any(out.iterdir()):
        return
    earlier = out / REPORT
    if not (earlier.is_file() and earlier.read_text().startswith(TITLE)):
        raise ValueError(f"out must be a new or empty folder, or hold an earlier report; got {out}")
    logs = [step.log for here in (False, True) for step in plan(here)] + [s.log for s in steps]
    for name in {*logs, *Results.FILES, *Pictures.FILES, REPORT}:
        (out / name).unlink(missing_ok=True)


def _load() -> str:
    """How busy the machine is before it has anything of ours to do: times depend on it."""
    return f"{os.cpu_count()} CPU cores, load average {os.getloadavg()[0]:.1f} at the start"


@dataclass
class _Report:
    out: Path
    scratch: Path  # for files of the steps that are not kept as they are
    outcomes: dict[Step, Outcome]
    results: Results = field(default_factory=Results)
    pictures: Pictures = field(default_factory=Pictures)
    interrupted: bool = False
    load: str = field(default_factory=_load)
    spare: float = 0.0  # seconds that the steps so far left of their limits, or overdrew

    def take(self, step: Step) -> None:
        """Run ``step``, unless there is a reason not to."""
        outcome = self.outcomes[step]
        if step.reason:
            return
        outcome.state = "running"
        self.write()
        words = [word.replace("{scratch}", str(self.scratch)) for word in step.command]
        command, log = [sys.executable, "-m", *words], self.out / step.log
        try:
            limit = step.limit + self.spare
            ended = process.run(command, log, limit, checkout())
            outcome.seconds, self.spare = ended.seconds, limit - ended.seconds
            outcome.state = "done" if ended.code == 0 else "failed"
            if ended.code is None:
                outcome.note = f"stopped after {limit:.0f} s, its limit"
            elif ended.code:
                outcome.note = f"exit code {ended.code}"
        except KeyboardInterrupt:
            outcome.state = "interrupted"
            raise
        finally:
            self._collect(step)
            self.write()

    def _collect(self, step: Step) -> None:
        outcome = self.outcomes[step]
        log = self.out / step.log
        outcome.output = self._scrub(log.read_text(errors="replace"))
        write(log, outcome.output)
        try:
            self.results.add(step.name, outcome.output, self.scratch)
        except (KeyError, ValueError, ElementTree.ParseError) as error:
            if outcome.state == "done":
                outcome.state, outcome.note = "failed", f"its results could not be read: {error}"
        for name, text in self.results.files().items():
            write(self.out / name, text)
        self.pictures.draw(self.results, self.out)

    def failed(self) -> list[str]:
        """What failed, by name."""
        names = [step.title for step, each in self.outcomes.items() if each.state == "failed"]
        return names + ["Pictures"] * bool(self.pictures.error)

    def verdict(self) -> str:
        """What to say of the whole."""
        if self.interrupted:
            return "interrupted"
        if any(each.state in ("waiting", "running") for each in self.outcomes.values()):
            return "running: what follows is what there is so far"
        return f"failed: {', '.join(self.failed())}" if self.failed() else "complete"

    def write(self) -> None:
        """The page, from what there is so far."""
        if self.interrupted:
            for each in self.outcomes.values():
                each.interrupt()
        text = page.render(self.verdict(), self.load, self.outcomes, self.results, self.pictures)
        write(self.out / REPORT, self._scrub(text))

    def _scrub(self, text: str) -> str:
        places = {self.scratch: "<scratch>", self.out.absolute(): "<out>"}
        return process.scrub(text, places | {root: "." for root in [checkout()] if root})
