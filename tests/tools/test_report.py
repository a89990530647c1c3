"""Does `report` keep what it has, say what is not there, and write down what was measured?"""

import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from benchmarked import kept, measured, timed

from deco_kernels.__main__ import main
from deco_kernels.tools.report import page, process, runner
from deco_kernels.tools.report import pictures as plots
from deco_kernels.tools.report import plan as plans
from deco_kernels.tools.report.plan import Step, checkout, plan

# A command that does what it is told.
FAKE = """
import pathlib, subprocess, sys, time
what, *rest = sys.argv[1:]
print(*rest, flush=True)
if what == "fail":
    sys.exit(3)
if what == "sleep":
    time.sleep(60)
if what == "nap":
    time.sleep(2)
if what == "spawn":
    with open(rest[0], "w") as file:
        code = "import time; time.sleep(60)"
        subprocess.Popen([sys.executable, "-c", code], pass_fds=[file.fileno()])
    time.sleep(60)
if what == "measure":
    source, target = map(pathlib.Path, rest)
    target.write_text(source.read_text())
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Stands in for the plan: takes the steps there are."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "fake.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)

    def take(*steps):
        monkeypatch.setattr(runner, "plan", lambda on_gpu: list(steps))

    return take


def step(name, *command, limit=60, reason=None):
    return Step(name, f"Step {name}", ("fake", *command), limit, reason)


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_what_comes_of_the_steps_is_in_the_report(fake, tmp_path):
    out = tmp_path / "new" / "report"
    words = measured(tmp_path, timed(), timed(0.5, provider="ours-eager"), kept())
    fake(
        step("info", "say", "device cpu  x86"),
        step("speed_llava", *words, "{scratch}/speed_llava.json"),
        step("gpu_tests", "say", reason="no CUDA device"),
    )
    assert main(["report", "--out", str(out)]) == 0
    text = (out / "report.md").read_text()
    assert text.startswith("# deco_kernels report\n\n**Complete.** Written 2")
    assert re.search(r"Device: x86; \d+ CPU cores, load average [\d.]+ at the start[.] ", text)
    assert "| Step speed_llava | done |" in text
    assert "| Step gpu_tests | not measured: no CUDA device |" in text
    assert "**Not measured**: no CUDA device." in text
    assert "| 10 | 1.25 (1.13 to 1.35) | 0.50 (0.38 to 0.60) |" in text
    assert "![Measured: time beside eager's](speed.png)" in text
    assert (out / "info.txt").read_text() == "device cpu  x86\n"
    for row in rows(out / "speed.csv"):
        assert row["ratio_to_eager"] == {"eager": "1.25", "ours-eager": "0.5"}[row["provider"]]
    assert "myhost" not in (out / "benchmarks.json").read_text()
    assert not list(out.glob("*.part"))


def test_a_failing_step_is_named_and_the_others_still_run(fake, tmp_path, capsys):
    fake(step("info", "fail", "it", "broke"), step("check", "say", "ok   bfloat16"))
    assert main(["report", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out.startswith("failed: Step info: ")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "**Failed: Step info.**" in text
    assert "| Step info | failed: exit code 3 |" in text
    assert "```\nit broke\n```" in text
    assert "1 cases right, 0 wrong" in text


def test_a_step_is_stopped_at_its_limit_and_keeps_what_it_wrote(fake, tmp_path):
    fake(step("info", "sleep", "begun", limit=1), step("check", "say", "later"))
    assert runner.run(tmp_path / "out") == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Step info | failed: stopped after 1 s, its limit |" in text
    assert (tmp_path / "out" / "info.txt").read_text().startswith("begun\n")
    assert (tmp_path / "out" / "check.txt").read_text() == "later\n"


def test_what_a_step_leaves_of_its_limit_is_the_next_ones(fake, tmp_path):
    fake(step("info", "say", limit=60), step("check", "nap", limit=1))
    assert runner.run(tmp_path / "out") == 0


def test_a_step_that_is_stopped_takes_its_own_processes_along(fake, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = threading.Thread(target=fifo.read_bytes, daemon=True)  # until nobody writes any more
    reader.start()
    fake(step("info", "spawn", str(fifo), limit=3))
    assert runner.run(tmp_path / "out") == 1
    reader.join(20)
    assert not reader.is_alive()


def test_results_that_cannot_be_read_are_a_failure(fake, tmp_path):
    fake(step("predict", "say", "nothing of use"))
    assert runner.run(tmp_path / "out") == 1
    text = (tmp_path / "out" / "report.md").read_text()
    assert "failed: its results could not be read: predict printed no table of chips" in text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interruption_keeps_the_sections_before(fake, tmp_path, number):
    out = tmp_path / "out"
    code = f"""if True:
        import sys
        from pathlib import Path
        from deco_kernels.tools.report import runner
        from deco_kernels.tools.report.plan import Step
        steps = [("info", "say", "device cpu  x86"), ("check", "sleep", "ok   bfloat16"), ("tune",)]
        steps = [Step(name, f"Step {{name}}", ("fake", *words), 60) for name, *words in steps]
        runner.plan = lambda on_gpu: steps
        sys.exit(runner.run(Path({str(out)!r})))
    """
    with subprocess.Popen([sys.executable, "-c", code], cwd=checkout()) as child:
        log = out / "check.txt"
        while child.poll() is None and not (log.exists() and log.read_text()):
            time.sleep(0.05)
        unfinished = (out / "report.md").read_text()
        child.send_signal(number)
    assert child.returncode == 130
    assert "**Running: what follows is what there is so far.**" in unfinished
    text = (out / "report.md").read_text()
    assert "**Interrupted.**" in text
    assert "Device: x86;" in text
    assert "| Step check | interrupted |" in text
    assert "1 cases right" in text
    assert "| Step tune | not measured: the report was interrupted before |" in text


@pytest.mark.parametrize("package", ["pytest_benchmark", "matplotlib"])
def test_missing_packages_are_told_at_the_start_and_cost_only_their_sections(
    monkeypatch, fake, tmp_path, package
):
    found = plans.importlib.util.find_spec
    monkeypatch.setattr(
        plans.importlib.util, "find_spec", lambda name: None if name == package else found(name)
    )
    reasons = {each.name: each.reason for each in plan(on_gpu=False)}
    assert reasons["info"] is reasons["check"] is reasons["predict"] is None
    how = f'{package.replace("_", "-")} missing: pip install ".[report]"'
    if package == "matplotlib":
        fake(step("speed_x", *measured(tmp_path, timed()), "{scratch}/speed_x.json"))
        assert runner.run(tmp_path / "out") == 0
        assert f"Not drawn: {how}." in (tmp_path / "out" / "report.md").read_text()
        assert rows(tmp_path / "out" / "speed.csv")
    else:
        assert reasons["memory"] == reasons["counts"] == how


def test_outside_a_checkout_only_the_package_is_asked(monkeypatch):
    monkeypatch.setattr(plans, "checkout", lambda: None)
    for each in plan(on_gpu=True):
        folder = "benchmarks" if "benchmarks" in each.command[1] else "tests"
        why = f"no {folder}/ here; run from a checkout"
        if each.command[0] == "pytest" and each.name != "counts":
            assert each.reason == why
        else:
            assert each.reason != why


@pytest.mark.parametrize(("on_gpu", "minutes"), [(True, 10), (False, 15)])
def test_all_limits_together_are_what_is_promised(on_gpu, minutes):
    steps = plan(on_gpu)
    assert sum(each.limit for each in steps if not each.reason) < 60 * minutes
    assert len({each.name for each in steps}) == len(steps)
    sections = {each.name for each in steps} | {each.name.partition("_")[0] for each in steps}
    assert set(page.SECTIONS) <= sections


def test_what_a_cpu_only_plans_says_so(fake, tmp_path):
    steps = {on_gpu: {each.name: each for each in plan(on_gpu)} for on_gpu in (True, False)}
    assert steps[True]["tune"].command == ("deco_kernels", "tune")
    planned = steps[False]["tune"]
    assert planned.command[-1] == "--dry-run"
    fake(Step("tune", planned.title, ("fake", "say", "the plan"), 60))
    runner.run(tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Tune: not measured here, this is the plan\n" in text
    assert "```\nthe plan\n```" in text
    assert steps[False]["gpu_tests"].reason == "no CUDA device"
    assert steps[True]["gpu_tests"].reason is None


@pytest.mark.slow
def test_the_step_of_the_gpu_finds_tests():
    (command,) = (each.command for each in plan(on_gpu=True) if each.name == "gpu_tests")
    run = subprocess.run(
        [sys.executable, "-m", *command, "--collect-only"],
        cwd=checkout(),
        capture_output=True,
        text=True,
    )
    found = [line for line in run.stdout.splitlines() if "::" in line]
    assert sum("-gpu" in line for line in found) >= 30
    assert any("test_workspace" in line for line in found)


def test_no_folder_of_this_machine_is_written(fake, tmp_path):
    places = [checkout() / "a.py", tmp_path / "b", Path.home() / "c", sys.executable, tmp_path]
    fake(step("info", "fail", *map(str, places)))
    out = tmp_path / "out"
    runner.run(out)
    for file in out.iterdir():
        text = file.read_text()
        for place in (checkout(), tmp_path, Path.home(), sys.prefix):
            assert not re.search(rf"{re.escape(str(place))}\b", text)
    assert (out / "info.txt").read_text().startswith("./a.py ")


def test_of_a_progress_bar_the_last_state_is_kept():
    assert process.scrub("one\n 1/3\r 2/3\r 3/3\nend  \n", {}) == "one\n 3/3\nend\n"


def test_a_folder_with_other_things_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "report.md").write_text("# My report\n")
    assert main(["report", "--out", str(tmp_path)]) == 2
    assert "out must be a new or empty folder, or hold an earlier report" in capsys.readouterr().err
    assert main(["report", "--out", str(tmp_path / "thesis.tex")]) == 2
    assert "out must be a folder, got the file" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.tex", "report.md"}


def test_an_earlier_report_is_replaced_and_nothing_else(fake, tmp_path):
    out = tmp_path / "out"
    fake(step("speed_x", *measured(tmp_path, timed()), "{scratch}/speed_x.json"))
    runner.run(out)
    (out / "notes.txt").write_text("mine")
    fake(step("info", "say", "hello"))
    runner.run(out)
    # speed_x is in no plan but the one before, so nobody knows its log any more.
    left = {path.name for path in out.iterdir()} - {"speed_x.txt"}
    assert left == {"info.txt", "notes.txt", "report.md"}


def test_a_picture_that_fails_costs_nothing_else(monkeypatch, fake, tmp_path):
    def broken(rows):
        raise ZeroDivisionError("no ink")

    monkeypatch.setattr(plots, "draw_speed", broken)
    words = measured(tmp_path, timed(), kept())
    fake(step("speed_x", *words, "{scratch}/speed_x.json"))
    out = tmp_path / "out"
    assert runner.run(out) == 1
    assert "Not drawn: speed.png: no ink." in (out / "report.md").read_text()
    assert (out / "memory.png").exists()
    assert rows(out / "speed.csv")
