"""Does ``compile`` list what fits a chip, and fail if one kernel does not?"""

import json
import re

import pytest
import torch
from machines.triton import INTERPRETING

from deco_kernels.__main__ import main
from deco_kernels.backends import triton as verbs
from deco_kernels.host import toolchain
from deco_kernels.tools import compile as aot

COMPILES_TRITON = pytest.mark.skipif(INTERPRETING, reason="the interpreter compiles nothing")


def only_line(text):
    (line,) = text.splitlines()
    return line


def row(**fields):
    plain = {
        "kernel": "dact_linear",
        "backend": "triton",
        "arch": 90,
        "config": "GROUP=8",
        "registers": 142,
        "spill_bytes": 0,
        "shared_bytes": 98304,
        "shared_limit": 232448,
        "tensor_core": "wgmma",
        "case": "bf16 dz",
        "compiler": "Triton 3.8.0",
    }
    return aot.Row(**{**plain, **fields})


def table_of(*steps, notes=()):
    """In place of ``aot.table``: nothing is compiled."""
    return lambda archs: aot.Table(iter(steps), len(steps), list(notes))


@COMPILES_TRITON
def test_without_nvcc_compile_lists_the_triton_kernels(jit, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(toolchain, "missing", toolchain.missing.__wrapped__)  # nothing is cached
    chosen = {"bf16 dz": jit.cases()["bf16 dz"]}
    monkeypatch.setattr(jit, "cases", lambda: chosen)
    assert main(["compile", "--arch", "80"]) == 0
    out, err = capfd.readouterr()
    _, product, summary, compiler = out.splitlines()
    assert compiler.startswith(
        f"Triton kernels by Triton {jit.triton.__version__}, tiles chosen with "
    )
    assert product.split()[:3] == ["sm_80", "triton", "dact_linear"]
    assert summary.startswith("all 1 fit")
    note, progress = err.splitlines()[0], err.splitlines()[-1]
    assert note.startswith("deco_kernels: CUDA kernels are not listed: nvcc was not found (")
    assert progress.endswith("compiled 1 of 1")


@COMPILES_TRITON
@pytest.mark.skipif(bool(verbs.unfenced(90)), reason=str(verbs.unfenced(90)))
def test_compile_prints_json_and_nothing_else(jit, monkeypatch, capfd):
    names = ["fp32 pool 576->144 backward", "bf16 dz"]
    chosen = {name: jit.cases()[name] for name in names}
    monkeypatch.setattr(jit, "cases", lambda: chosen)
    monkeypatch.setattr(aot, "ARCHS", {"triton": aot.ARCHS["triton"]})
    monkeypatch.setattr(jit, "MOST_WORKERS", 1)  # another one would import torch once more
    assert main(["compile", "--arch", "80,90", "--json"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    rows = json.loads(out)
    assert [(r["arch"], r["case"]) for r in rows] == [(a, n) for a in (80, 90) for n in names]
    pool, product = rows[2:]
    assert (
        set(pool)
        == set(product)
        == {
            *("kernel", "backend", "arch", "config", "registers", "spill_bytes"),
            *("shared_bytes", "shared_limit", "tensor_core", "case", "compiler"),
        }
    )
    assert (pool["kernel"], pool["tensor_core"]) == ("pool", None)
    assert pool["compiler"] == f"Triton {jit.triton.__version__}"
    assert pool["config"] == "PM=4 PK=256 warps=4 stages=1"
    assert product["kernel"] == "dact_linear"
    assert product["tensor_core"] == "wgmma"
    assert product["spill_bytes"] == 0
    assert 0 < product["shared_bytes"] <= product["shared_limit"] == 232448
    assert product["registers"] > 0


def test_compile_prints_an_aligned_table_and_a_summary(monkeypatch, capsys):
    pool = row(kernel="pool", config="PM=8 PK=512", registers=37, tensor_core=None)
    monkeypatch.setattr(aot, "table", table_of(aot.Step([row()]), aot.Step([pool])))
    assert main(["compile"]) == 0
    header, *lines, summary = capsys.readouterr().out.splitlines()
    for line, config in zip(lines, ("GROUP=8", "PM=8 PK=512"), strict=True):
        assert line.index(config) == header.index("config")
        assert line.startswith("sm_90")
    assert lines[1].split()[-1] == "-"
    assert summary.startswith("all 2 fit")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"spill_bytes": 8}, "! spills 8 bytes"),
        ({"kernel": "pool", "tensor_core": None, "spill_bytes": 16}, "! spills 16 bytes"),
        ({"shared_bytes": 232449}, "! 232449 of 232448 bytes of shared memory"),
        ({"tensor_core": None}, "! no tensor cores"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_compile_fails_if_one_row_must_not_ship(monkeypatch, capsys, fields, problem, flags):
    steps = aot.Step([row()]), aot.Step([row(**fields)]), aot.Step([row()])
    monkeypatch.setattr(aot, "table", table_of(*steps))
    assert main(["compile", *flags]) == 1
    out = capsys.readouterr().out
    if not flags:
        _, good, bad, _, summary = out.splitlines()
        assert bad.endswith(problem)
        assert "!" not in good
        assert summary.startswith("1 of 3 must not ship")


CUDA_AND_TRITON = (
    aot.Step([row(arch=80, backend="cuda"), row(arch=80, kernel="pool")], "sm_80: in 7.1 s"),
    aot.Step([row(arch=90, backend="cuda")], "sm_90: in 7.2 s"),
    aot.Step([row(arch=80)]),
)


def test_compile_says_last_what_an_architecture_took(monkeypatch, capsys):
    monkeypatch.setattr(aot, "table", table_of(*CUDA_AND_TRITON, notes=["no such kernels: why"]))
    assert main(["compile"]) == 0
    out, err = capsys.readouterr()
    _, *rows, summary, first, second = out.splitlines()
    found = [line.split()[:2] for line in rows]
    assert found == [["sm_80", "cuda"], ["sm_80", "triton"], ["sm_80", "triton"], ["sm_90", "cuda"]]
    assert summary.startswith("all 4 fit")
    assert (first, second) == ("sm_80: in 7.1 s", "sm_90: in 7.2 s")
    assert err.splitlines()[0] == "deco_kernels: no such kernels: why"
    assert err.endswith("compiled 3 of 3\n")


def test_compile_prints_rows_alone_as_json(monkeypatch, capsys):
    monkeypatch.setattr(aot, "table", table_of(*CUDA_AND_TRITON, notes=["no such kernels: why"]))
    assert main(["compile", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [row["arch"] for row in json.loads(out)] == [80, 80, 80, 90]
    assert only_line(err) == "deco_kernels: no such kernels: why"


def test_compile_is_for_every_generation_by_default(monkeypatch, capsys):
    asked = []
    nothing = table_of(aot.Step([row()]))
    monkeypatch.setattr(aot, "table", lambda archs: asked.append(archs) or nothing(archs))
    main(["compile"])
    main(["compile", "--arch", "75,90"])
    assert asked == [None, [75, 90]]
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="0"):
        main(["compile", "--help"])
    (listed,) = re.findall(r"default: ([\d,]+), and ([\d,]+) for", capsys.readouterr().out)
    triton_archs, others = (tuple(map(int, archs.split(","))) for archs in listed)
    assert triton_archs == aot.ARCHS["triton"] == (80, 89, 90, 100, 120)
    assert others == (75, 86)
    assert aot.ARCHS["cuda"] == tuple(sorted(triton_archs + others))


def test_an_unknown_arch_is_one_line_of_error_that_lists_the_known(capsys):
    assert main(["compile", "--arch", "80,70"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = only_line(err)
    assert line == "deco_kernels: error: unknown arch 70; known are 75, 80, 86, 89, 90, 100, 120"
