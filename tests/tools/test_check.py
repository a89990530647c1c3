"""Does `check` see an error, can its bars fail, and are the bounds right and of any use?"""

import pytest
import torch
from numeric import CASES, numeric, seeds, wrong

from deco_kernels import backends
from deco_kernels.tools import check
from deco_kernels.tools.check import Error, draw, error, errors, over, step
from deco_kernels.tools.check.bounds import Arithmetic, Ball, bounds, exact
from deco_kernels.tools.measure import float32_matmul

CPU = torch.device("cpu")
COMPILED = "triton", "cuda", "composed"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(check, "CASES", check.CASES[3:4])


def test_right_backends_pass(small, capsys):
    """On a CPU that is torch's own; the others are named, and why they are not checked."""
    assert check.run(device="cpu")
    printed = capsys.readouterr().out.splitlines()
    usable = [name for name in COMPILED if not backends.unusable(name, CPU, torch.float16)]
    for name in COMPILED:
        assert any(line.startswith(f"skip {name}") for line in printed) or name in usable
    assert any(
        line.startswith("ok   eager    bfloat16 [1, 49, 80] -> [1, 9, 136], 3 layers")
        for line in printed
    )
    assert printed[-1].startswith("all right (bars: 1.1 times")


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_backend_fails(monkeypatch, small, capsys, factor):
    eager = backends.get("eager")
    real = eager.dact_linear
    monkeypatch.setattr(
        eager, "dact_linear", lambda *a: tuple(t if t is None else t * factor for t in real(*a))
    )
    assert not check.run("eager", "cpu")
    printed = capsys.readouterr().out
    assert "FAIL eager    float32" in printed
    assert "\n    mlp_projector.2.weight" in printed
    assert "\n    output" not in printed  # of those that fail, what is wrong
    assert printed.splitlines()[-1].startswith("WRONG")


def test_every_usable_backend_is_asked_for_every_case_and_dtype(monkeypatch, capsys):
    """Also where "auto" would take another."""
    reasons = {("composed", torch.bfloat16): "no bfloat16", ("cuda", torch.float16): "no half"}
    monkeypatch.setattr(check, "unusable", lambda name, _, dtype: reasons.get((name, dtype)))
    monkeypatch.setattr(check.library, "built", lambda arch: True)
    asked = []
    monkeypatch.setattr(
        check,
        "case_errors",
        lambda case, dtype, place, backend, seeds: (
            asked.append((backend, dtype, case)) or [Error("output", 1, 1.0, 1.0, 0.0)]
        ),
    )
    assert check.run(device="cpu")
    dtypes = torch.float16, torch.bfloat16, torch.float32
    every = [(b, t, c) for b in (*COMPILED, "eager") for t in dtypes for c in check.CASES]
    assert asked == [each for each in every if each[:2] not in reasons]
    printed = capsys.readouterr().out
    assert "skip composed bfloat16: no bfloat16" in printed
    assert "skip cuda float16: no half" in printed
    assert printed.count("skip") == 2


def test_a_library_that_is_not_built_is_built_only_if_asked_for(monkeypatch, small, capsys):
    monkeypatch.setattr(check, "unusable", lambda name, *_: None if name == "cuda" else "no")
    monkeypatch.setattr(check.library, "built", lambda arch: False)
    found = lambda *a: [Error("output", 1, 1.0, 1.0, 0.0)]  # noqa: E731
    monkeypatch.setattr(check, "case_errors", found)
    assert check.run(device="cpu")
    assert "skip cuda: its library is not built yet, and --backend cuda builds it" in (
        capsys.readouterr().out
    )
    assert check.run("cuda", "cpu")
    printed = capsys.readouterr().out
    assert "ok   cuda" in printed
    assert "skip" not in printed


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_run_is_an_error(backend):
    if backend == "triton" and backends.unusable("triton", CPU, torch.float16) is None:
        pytest.skip("interpreting")
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run here: "):
        check.run(backend, "cpu")


def test_the_bar_is_eagers_error_and_half_an_ulp():
    truth = torch.full((10_000,), 3.0, dtype=torch.double)
    ulp = 2.0**-7  # of bfloat16, relative

    def off(by, eager_by=0.0):
        return error("t", *((truth + t).bfloat16() for t in (by, eager_by)), truth)

    assert off(0.0).floor == pytest.approx(3 * ulp / 2)
    assert off(0.0).count == 10_000
    step = 2.0**-6  # of bfloat16 between 2 and 4
    assert off(step * (torch.arange(10_000) % 2)).within()  # half of them: 0.7
    assert not off(step).within()
    assert off(2 * step, 2 * step).within()
    assert off(step, -step) == off(-step, step)
    assert not off(4 * step, 2 * step).within()
    assert off(4 * step, 2 * step).within(2.0)
    one = torch.zeros(10_000)
    one[7] = torch.nan
    assert off(one).ours == torch.inf
    assert not off(one).within()
    assert not off(one, one).largest


def test_few_numbers_say_less():
    """Of four draws of ten numbers a ratio of 1.5 is nothing, of a thousand times more it is."""
    draws = [[Error("t", 10, ours, 1.0, 0.0)] for ours in (0.0, 0.0, 0.0, 3.0)]
    (found,) = over(draws)
    assert (found.count, found.ours, found.eager) == (40, 1.5, 1.0)
    assert found.within()
    assert not found._replace(count=40_000).within()


@pytest.mark.parametrize("largest", [1.01, torch.inf])
def test_one_number_beyond_its_bound_is_wrong(largest):
    assert Error("t", 100, 0.0, 1.0, 0.0, 1.0).within()
    assert not Error("t", 100, 0.0, 1.0, 0.0, largest).within()
    (found,) = over([[Error("t", 100, 0.0, 1.0, 0.0, each)] for each in (0.5, largest, 0.7)])
    assert not found.within()


def at_worst(ball, seed):
    """A tensor as far off as the ball allows, in random directions."""
    sign = torch.rand(ball.value.shape, generator=torch.Generator().manual_seed(seed)).sub(0.5)
    return ball.value + ball.radius * sign.sign()


@numeric
def test_balls_hold_what_comes_of_all_that_they_hold():
    for seed in seeds():
        r = torch.Generator().manual_seed(seed)
        a, b, c = (
            Ball(*(torch.randn(*shape, generator=r).double() for _ in range(2)))
            for shape in ((7, 30), (30, 5), (7, 5))
        )
        a, b, c = (Ball(t.value, t.radius.abs() / 10) for t in (a, b, c))
        do = Arithmetic.of(torch.bfloat16)
        y = do.product(a, b, 30)
        assert ((at_worst(a, 1) @ at_worst(b, 2) - y.value).abs() <= y.radius).all()
        y = do.times(y, c)
        off = at_worst(a, 1) @ at_worst(b, 2) * at_worst(c, 3) - y.value
        assert (off.abs() <= y.radius).all()
        for act in (torch.nn.functional.gelu, torch.nn.functional.silu):
            y, slope = do.activation(c, act)
            at = at_worst(c, 4).requires_grad_()
            (want,) = torch.autograd.grad(act(at).sum(), at)
            assert ((act(at) - y.value).abs() <= y.radius).all()
            assert ((want - slope.value).abs() <= slope.radius).all()
        y = do.stored(c)
        assert ((at_worst(c, 5).bfloat16().double() - c.value).abs() <= y.radius).all()


@numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_wrong_element_is_beyond_its_bound(dtype):
    """A sign in one gradient of a thousand numbers or more: the root mean square hides it."""
    for seed in seeds(2):
        made = draw(CASES["overlapping"], dtype, CPU, "eager", seed)
        right = step(made.oracle, made.x, made.dy)
        radii = bounds(made.chain, made.x, made.dy)
        for t, radius in zip(right, radii, strict=True):
            assert t.shape == radius.shape
            place = t.abs().argmax()
            t.view(-1)[place] *= -1
            assert t.view(-1)[place].abs() * 2 > radius.view(-1)[place]


@numeric
def test_products_in_tf32_are_within_their_wider_bound_and_not_within_the_others():
    made = draw(CASES["unaligned"], torch.float32, CPU, "eager", seeds()[0])
    with torch.no_grad():
        for p in made.fused.parameters():
            p.copy_((p.view(torch.int32) & ~0x1FFF).view(torch.float32))
    with float32_matmul("ieee"):
        assert wrong(errors(*made))
        assert max(e.largest for e in errors(*made)) > 1
    with float32_matmul("tf32"):
        assert max(e.largest for e in errors(*made)) < 1


def test_nothing_off_is_allowed_for_numbers_that_are_exact():
    assert not exact(torch.ones(3)).radius.any()
