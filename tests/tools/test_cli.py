"""Does ``python -m deco_kernels`` say what is asked, and exit with the right code?"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from machines.triton import INTERPRETING

import deco_kernels
from deco_kernels.__main__ import main
from deco_kernels.host import library, toolchain
from deco_kernels.tools import check, demo
from deco_kernels.tools.table import rank
from deco_kernels.tuning import table
from deco_kernels.tuning.chips import CHIPS

COMPILES_CUDA = pytest.mark.skipif(toolchain.nvcc() is None, reason="nvcc was not found")


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=Path(deco_kernels.__file__).parents[1],
        capture_output=True,
        text=True,
    )


def lines_of(report):
    return dict(re.split(r"\s{2,}", line, maxsplit=1) for line in report.splitlines())


def only_line(text):
    (line,) = text.splitlines()
    return line


def test_help_names_every_command():
    run = python("-m", "deco_kernels", "--help")
    assert run.returncode == 0
    for command in ("info", "check", "compile", "predict", "tune", "table", "report", "demo"):
        assert re.search(rf"^ +{command} +\w", run.stdout, re.M)


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("info", []),
        ("check", ["--device", "--backend"]),
        ("compile", ["--arch", "--json"]),
        (
            "predict",
            [
                *("--chip", "--batch", "--gemm-efficiency", "--fused-over-cublas"),
                *("--dram-efficiency", "--l2-bytes-per-clock", "--pool-efficiency"),
                *("--aten-pool-efficiency", "--pointwise-efficiency", "--launch-us"),
            ],
        ),
        ("table", ["--out"]),
        (
            "tune",
            [
                *("--grid", "--query-num", "--mm-hidden-size", "--llm-hidden-size", "--layer-num"),
                *("--batch", "--dtype", "--device", "--dry-run"),
            ],
        ),
        ("demo", ["--out", "--steps", "--seed", "--device", "--backend"]),
        ("report", ["--out"]),
    ],
)
def test_help_of_a_command_names_its_flags(command, flags, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    found = re.findall(r"^  (--[\w-]+)", capsys.readouterr().out, re.M)
    assert found == flags


def test_info_tells_versions_and_usable_backends(capsys):
    triton = pytest.importorskip("triton")
    assert main(["info"]) == 0
    lines = lines_of(capsys.readouterr().out)
    assert lines["deco_kernels"] == deco_kernels.__version__
    assert lines["torch"] == torch.__version__
    assert lines["triton"] == triton.__version__
    assert lines["float32 products"] == torch.backends.cuda.matmul.fp32_precision
    assert lines["backend eager"] == "usable"
    assert "float64 not usable: float64 is left to torch" in lines["backend triton"]
    assert sum(name.startswith("device cuda:") for name in lines) == torch.cuda.device_count()


def test_info_tells_of_tiles_that_another_triton_compiled(monkeypatch, capsys):
    triton = pytest.importorskip("triton")
    for made, other in (
        (triton.__version__, ""),
        ("1.2.3", f", not with the {triton.__version__}"),
    ):
        monkeypatch.setattr(table, "made_with", lambda made=made: made)
        main(["info"])
        line = lines_of(capsys.readouterr().out)["tiles"]
        found = "chosen and compiled with Triton " + made + other
        assert line == found + (" that is here" if other else "")


def test_info_tells_where_the_cuda_kernels_are(monkeypatch, capsys):
    monkeypatch.setattr(library, "state", lambda: "cannot be built: nvcc was not found")
    main(["info"])
    lines = lines_of(capsys.readouterr().out)
    assert lines["CUDA kernels"] == "cannot be built: nvcc was not found"


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton is usable on this GPU")
def test_info_tells_why_a_backend_is_not_usable(capsys):
    main(["info"])
    lines = lines_of(capsys.readouterr().out)
    assert re.search(r"bfloat16\b.* not usable: .*\bcpu\b", lines["backend triton"]) or (
        INTERPRETING
    )
    assert lines["backend auto"].startswith("eager on cpu: ")


def test_without_triton_info_works_and_without_nvcc_too_compile_says_what_is_missing():
    run = python(
        "-c",
        "import os, sys; sys.modules['triton'] = None; os.environ['CUDA_HOME'] = '/nowhere'; "
        "import torch; torch.version.cuda = '13.0'; from deco_kernels.__main__ import main; "
        "assert main(['info']) == 0; sys.exit(main(['compile']))",
    )
    lines = lines_of(run.stdout)
    assert lines["triton"].startswith("missing (")
    assert lines["backend triton"].startswith("not usable: triton cannot be imported (")
    error = re.match(
        r"deco_kernels: error: CUDA kernels are not listed: nvcc was not found .*; "
        r"Triton kernels are not listed: triton cannot be imported \(",
        only_line(run.stderr),
    )
    assert error, run.stderr
    assert run.returncode == 2


def test_without_triton_table_ranks_and_writes_nothing(tmp_path):
    code = (
        "import sys; sys.modules['triton'] = None; from deco_kernels.__main__ import main;"
        " sys.exit(main(['table', *sys.argv[1:]]))"
    )
    run = python("-c", code)
    missing = r"triton cannot be imported \(.*\)$"
    assert re.match(f"deco_kernels: as ranked, nothing is compiled: {missing}", run.stderr)
    lines = run.stdout.splitlines()
    assert len(lines) == len({chip.arch for chip in CHIPS.values()}) * 4
    assert all(line.endswith(" us  not compiled") for line in lines)
    assert run.returncode == 0
    run = python("-c", code, "--out", str(tmp_path / "table.json"))
    refused = "deco_kernels: error: no table is written of what nothing has compiled: "
    assert re.match(refused + missing, run.stderr)
    assert run.returncode == 2
    assert not list(tmp_path.iterdir())


@COMPILES_CUDA
def test_without_triton_compile_lists_the_cuda_kernels():
    run = python(
        "-c",
        "import sys; sys.modules['triton'] = None; from deco_kernels.tools.compile import cuda; "
        "cuda.SOURCES = ['dgelu.cu']; from deco_kernels.__main__ import main; "
        "sys.exit(main(['compile', '--arch', '80', '--json']))",
    )
    assert run.returncode == 0
    assert [(row["backend"], row["case"]) for row in json.loads(run.stdout)] == [
        ("cuda", "bf16"),
        ("cuda", "fp16"),
        ("cuda", "fp32"),
    ]
    note = "deco_kernels: Triton kernels are not listed: triton cannot be imported ("
    assert only_line(run.stderr).startswith(note)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "arguments are required: command"),
        (["compile", "--arch", "80,x"], "'80,x' is not a list of compute capabilities"),
        (["compile", "--arch", ""], "'' is not a list of compute capabilities"),
        (["check", "--backend", "metal"], "invalid choice: 'metal'"),
        (["predict", "--chip", "V100"], "invalid choice: 'V100'"),
        (["predict", "--launch-us", "few"], "invalid float value: 'few'"),
        (["demo", "--steps", "many"], "invalid int value: 'many'"),
        (["fly"], "invalid choice: 'fly'"),
    ],
)
def test_bad_arguments_are_refused(capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_predict_needs_neither_triton_nor_a_gpu():
    run = python(
        "-c",
        "import sys; sys.modules['triton'] = None; from deco_kernels.__main__ import main; "
        "sys.exit(main('predict --chip h100 l40s --batch 8 --launch-us 2.5'.split()))",
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("Predicted microseconds")
    assert re.search(r"^launch_us +2\.5 ", run.stdout, re.M)
    chips = re.findall(r"^(\w+) +shipped +\d", run.stdout, re.M)
    assert chips == ["H100", "L40S"]


def test_an_assumption_that_cannot_be_is_one_line_of_error(capsys):
    assert main(["predict", "--dram-efficiency", "0"]) == 2
    line = only_line(capsys.readouterr().err)
    assert line == "deco_kernels: error: dram_efficiency must be positive, got 0.0"


@pytest.mark.parametrize(("good", "code"), [(True, 0), (False, 1)])
def test_check_exits_by_its_verdict(monkeypatch, good, code):
    asked = []
    monkeypatch.setattr(check, "run", lambda **options: asked.append(options) or good)
    assert main(["check"]) == code
    assert main(["check", "--backend", "eager", "--device", "cpu"]) == code
    assert asked == [{}, {"backend": "eager", "device": "cpu"}]


def test_a_device_that_does_not_exist_is_one_line_of_error(capsys):
    assert main(["check", "--device", "teapot"]) == 2
    assert re.match(r"deco_kernels: error: .*teapot", only_line(capsys.readouterr().err))


@pytest.mark.parametrize("error", [ValueError, TypeError, RuntimeError, ImportError])
def test_errors_of_the_users_making_are_one_line(monkeypatch, capsys, error):
    def run(**options):
        raise error("too many layers\nand a long story")

    monkeypatch.setattr(check, "run", run)
    assert main(["check"]) == 2
    assert only_line(capsys.readouterr().err) == "deco_kernels: error: too many layers"


def test_errors_of_ours_keep_their_traceback(monkeypatch):
    def run(**options):
        raise AssertionError

    monkeypatch.setattr(check, "run", run)
    with pytest.raises(AssertionError):
        main(["check"])


@pytest.mark.parametrize("flag", [[], ["--out"]])
def test_table_prints_verdicts_and_writes_if_told_to(monkeypatch, capsys, tmp_path, flag):
    search = pytest.importorskip("deco_kernels.tools.table.search", reason="no Triton")
    fast, slow = rank.candidates("pool_linear", 2)[:2]
    told = [
        search.Verdict(90, "pool_linear", 2, fast, 1.5, "spills 8 bytes in bf16 gelu 576->1"),
        search.Verdict(90, "pool_linear", 2, slow, 2.0, None),
    ]
    monkeypatch.setattr(search, "verdicts", lambda: iter(told))
    path = tmp_path / "table.json"
    assert main(["table", *flag, *[str(path)] * len(flag)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == f"sm_90 pool_linear 2 bytes  {fast}  1.5 us  {told[0].problem}"
    assert second == f"sm_90 pool_linear 2 bytes  {slow}  2.0 us  ships"
    assert path.exists() == bool(flag)
    if flag:
        (entry,) = [e for e in table.load(path.read_text()) if e.kernel == "pool_linear"]
        assert (entry.config, entry.us) == (slow, 2.0)
        assert entry.refused == (table.Refused(fast, 1.5, told[0].problem),)


def test_demo_gets_what_was_given_and_no_more(monkeypatch):
    asked = []
    monkeypatch.setattr(demo, "run", lambda **options: asked.append(options))
    assert main(["demo"]) == 0
    arguments = "--out a.png --steps 5 --seed 1 --device cpu --backend eager"
    assert main(["demo", *arguments.split()]) == 0
    given = {"out": Path("a.png"), "steps": 5, "seed": 1, "device": "cpu", "backend": "eager"}
    assert asked == [{}, given]
