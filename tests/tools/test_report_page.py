"""Does the report say what the steps measured, and no more?"""

import json
import re
import subprocess
import sys

import pytest
from benchmarked import benchmark, kept, timed

from deco_kernels.tools.predict import report as predicted_times
from deco_kernels.tools.report import collect, page
from deco_kernels.tools.report import pictures as plots
from deco_kernels.tools.report.plan import checkout


def test_rows_of_the_files():
    (row,) = collect.speed([timed(peak=900.0, saved_bytes=7), kept()])
    assert row == {
        "shape": "llava-576-144-b1",
        "mode": "step-frozen",
        "provider": "eager",
        "sizes": "[1, 2, 3] -> [1, 1, 3]",
        "dtype": "float32",
        "device": "a CPU",
        "milliseconds": 12.5,
        "eager_milliseconds": 10.0,
        "ratio_to_eager": 1.25,
        "ratio_lowest": 1.127,
        "ratio_highest": 1.35,
        "gigabytes_per_second": 2.0,
        "teraflop_per_second": 0.1,
        "percent_of_roofline": 12.3,
        "peak_teraflop_per_second": 900.0,
        "peak_gigabytes_per_second": 900.0,
        "saved_bytes": 7,
        "peak_memory_bytes": None,
    }
    (row,) = collect.memory([timed(), kept(provider="compile")])
    assert (row["provider"], row["saved_bytes"], row["ratio_to_eager"]) == ("compile", 50, 0.5)
    step_ = benchmark("training_step", ratio_to_oracle=1.23456)
    host = benchmark("host_overhead", microseconds_over_oracle=129.87)
    first, second = collect.projector([step_, timed(), host])
    assert (first["ratio_to_oracle"], second["microseconds_over_oracle"]) == (1.235, 129.9)


def test_counts_come_from_what_the_tests_recorded(tmp_path):
    row = {"kernel": "pool", "case": "a"}
    row |= {f"{who}_{what}": 3 for who in ("executed", "model") for what in collect.QUANTITIES}
    launches = {"tower": "frozen", "forward": 2, "backward": 5}
    recorded = [("counts", row), ("launches", launches), ("other", {})]
    properties = "".join(
        f'<property name="{name}" value="{json.dumps(value).replace(chr(34), "&quot;")}"/>'
        for name, value in recorded
    )
    cases = f"<testcase><properties>{properties}</properties></testcase>"
    (tmp_path / "counts.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    results = collect.Results()
    results.add("counts", "", tmp_path)
    assert (results.counts, results.launches) == ([row], [launches])
    printed = "\n".join(page._counts("24 passed in 3.1s", results))
    assert "| pool | 1 | 3 | 3 | 3 | 3 | 0 |" in printed
    assert "| frozen | 2 | 5 |" in printed
    results.counts[0]["model_mma"] = 5
    assert "| pool | 1 | 3 | 3 | 3 | 3 | 2 |" in "\n".join(page._counts("", results))


def test_predictions_are_those_that_predict_prints():
    found = list(collect.predictions(predicted_times(["H100", "B200"])))
    assert {row["chip"] for row in found} == {"H100", "B200"}
    for row in found:
        gain = float(row["pool_cublaslt_us"]) / float(row["fused_us"])
        assert float(row["pool+Lt_over_ours"]) == pytest.approx(gain, abs=0.006)
        gain = float(row["eager_step_us"]) / float(row["step_us"])
        assert float(row["eager_over_ours"]) == pytest.approx(gain, abs=0.006)


def test_pictures_are_drawn_of_what_there_is(tmp_path):
    results, pictures = collect.Results(), plots.Pictures()
    pictures.draw(results, tmp_path)
    assert not list(tmp_path.iterdir())
    both = [timed(provider=provider, peak=900.0) for provider in plots.LOOKS]
    results.benchmarks = [*both, timed(mode="forward"), *map(kept, [10, 20])]
    results.predicted = list(collect.predictions(predicted_times()))
    pictures.draw(results, tmp_path)
    assert pictures.error is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(plots.Pictures.FILES)
    assert pictures.of("speed") == ["speed.png", "roofline.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 100_000


def test_without_published_peaks_the_roofline_is_the_predicted_one(tmp_path):
    results, pictures = collect.Results(benchmarks=[timed()]), plots.Pictures()
    results.predicted = list(collect.predictions(predicted_times()))
    pictures.draw(results, tmp_path)
    assert pictures.of("predict") == ["roofline.png"]
    (axes,) = plots.draw_predicted(results.predicted).axes
    assert axes.get_title().startswith("Predicted, not measured")


def test_what_was_not_measured_is_told_once_with_its_reason():
    output = """
SKIPPED [2] benchmarks/test_speed.py:31: compile: no C++ compiler
SKIPPED [5] benchmarks/test_speed.py:31: ours-triton: it needs a CUDA device
SKIPPED [5] benchmarks/test_speed.py:31: ours-cuda: it needs a CUDA device
SKIPPED [5] benchmarks/test_speed.py:31: eager: only one image is measured, not 8
SKIPPED [5] benchmarks/test_speed.py:31: eager: only one image is measured, not 64
"""
    assert page._skipped(output)[3:] == [
        "- compile (no C++ compiler)",
        "- ours-triton, ours-cuda (it needs a CUDA device)",
        "- cases such as: only one image is measured, not 64",
    ]


def test_readme_holds_the_results_of_the_report():
    """`python benchmarks/readme.py` after a new report."""
    run = subprocess.run(
        [sys.executable, "-c", "import readme; print(readme.region(), end='')"],
        cwd=checkout() / "benchmarks",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    readme = (checkout() / "README.md").read_text()
    (found,) = re.findall("<!-- results: begin -->\n(.*)<!-- results: end -->", readme, re.S)
    assert found == run.stdout
