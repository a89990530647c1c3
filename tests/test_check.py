"""Does `check` see an error, and can the error bar fail?"""

import pytest
import torch

from deco_kernels import backends, check


def test_a_right_backend_passes(monkeypatch, capsys):
    monkeypatch.setattr(check, "CASES", check.CASES[3:])
    assert check.run("eager", "cpu")
    printed = capsys.readouterr().out
    assert "ok   bfloat16 [1, 49, 80] -> [1, 9, 136], 3 layers" in printed
    assert "mlp_projector.4.bias" in printed


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_backend_fails(monkeypatch, capsys, factor):
    eager = backends.get("eager")
    real = eager.dact_linear
    monkeypatch.setattr(check, "CASES", check.CASES[3:4])
    monkeypatch.setattr(
        eager, "dact_linear", lambda *a: tuple(t if t is None else t * factor for t in real(*a))
    )
    assert not check.run("eager", "cpu")
    assert "FAIL float32" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_is_an_error(backend):
    if (
        backend == "triton"
        and backends.unusable("triton", torch.device("cpu"), torch.float16) is None
    ):
        pytest.skip("interpreting")
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here: "):
        check.run(backend, "cpu")


def test_the_bar_is_eagers_error_and_one_ulp():
    truth = torch.tensor([3.0, 0.1], dtype=torch.double)
    ulp = 2.0**-6  # of bfloat16 between 2 and 4

    def error(ours, eager):
        return check._error("t", torch.tensor(ours).bfloat16(), torch.tensor(eager), truth)

    assert error([3.0, 0.1], [3.0, 0.1]).ulp == ulp
    assert error([3.0 + ulp, 0.1], [3.0, 0.1]).within()
    assert not error([3.0 + 2 * ulp, 0.1], [3.0, 0.1]).within()
    assert error([3.0 + 2 * ulp, 0.1], [3.0 + 2 * ulp, 0.1]).within()
    assert not error([float("nan"), 0.1], [3.0, 0.1]).within()
