"""Is the shipped table what the model and the compiler say, and does everybody get its entry?"""

import itertools
import json
import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import triton

from deco_kernels.kernels.launch import Config
from deco_kernels.tools import predict as tables
from deco_kernels.tools.compile import triton as jit
from deco_kernels.tools.table import rank, search
from deco_kernels.tuning import config_for, table
from deco_kernels.tuning.chips import CHIPS

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ARCHS = sorted({chip.arch for chip in CHIPS.values()})
ENTRIES = table.load(table.FILE.read_text())
RANKED = [entry for entry in ENTRIES if entry.kernel in rank.RANKED]
SMALL = Config({"PM": 8, "PK": 256}, num_warps=1, num_stages=1)


def key(entry):
    return entry.arch, entry.kernel, entry.itemsize


def name(entry):
    return "sm_{} {} {}".format(*key(entry))


def test_there_is_an_entry_for_every_chip_kernel_and_element_size():
    keys = [key(entry) for entry in ENTRIES]
    kernels = sorted([*rank.RANKED, *rank.constants(2)])
    assert ARCHS == [80, 89, 90, 100, 120]
    assert keys == list(itertools.product(ARCHS, kernels, (2, 4)))


@pytest.mark.parametrize("entry", RANKED, ids=name)
def test_the_table_is_in_todays_order_of_the_model_and_says_why_not(entry):
    tried = [(each.us, each.config) for each in entry.refused] + [(entry.us, entry.config)]
    assert tried == rank.ranked(entry.kernel, entry.itemsize, entry.arch)[: len(tried)]
    assert all(each.reason for each in entry.refused)


def test_what_the_model_does_not_choose_is_constant():
    for entry in ENTRIES:
        if entry not in RANKED:
            assert entry.config == rank.constants(entry.itemsize)[entry.kernel]
            assert (entry.us, entry.refused) == (None, ())


def test_candidates_are_ranked_by_times_and_a_tie_keeps_their_order():
    found = rank.ranked("dact_linear", 2, 120)
    times, configs = zip(*found, strict=True)
    assert list(times) == sorted(times)
    given = rank.candidates("dact_linear", 2)
    assert sorted(map(str, configs)) == sorted(map(str, given))
    assert times[0] == times[1]
    assert given.index(configs[0]) < given.index(configs[1])


def test_the_file_is_what_dump_writes():
    text = table.FILE.read_text()
    assert table.dump(ENTRIES, json.loads(text)["triton"]) == text


@pytest.mark.parametrize(
    ("arch", "takes"),
    [
        *((arch, arch) for arch in (80, 89, 90, 100, 120)),
        *((86, 89), (87, 89), (103, 100), (121, 120), (110, 100), (130, 120), (75, 80)),
    ],
)
def test_an_arch_that_is_not_listed_takes_a_neighbours_entry(arch, takes):
    assert table.listed(arch, ARCHS) == takes
    for kernel, dtype in itertools.product(("pool_linear", "pool"), (BF16, FP32)):
        assert config_for(kernel, dtype, arch) is config_for(kernel, dtype, takes)


def test_the_configuration_is_the_entrys():
    for entry in ENTRIES:
        for dtype in {2: (BF16, FP16), 4: (FP32,)}[entry.itemsize]:
            assert config_for(entry.kernel, dtype, entry.arch) == entry.config


def test_an_override_holds_for_one_kernel_and_size_until_its_end():
    before = config_for("pool", BF16, 80)
    with table.override("pool", 2, SMALL):
        assert config_for("pool", FP16, 90) is SMALL
        assert config_for("pool", FP32, 90) != SMALL
        assert config_for("bias_grad", BF16, 90) != SMALL
        with table.override("pool", 2, before):
            assert config_for("pool", BF16, 80) is before
        assert config_for("pool", BF16, 80) is SMALL
    assert config_for("pool", BF16, 80) is before


def test_every_form_of_a_product_is_compiled():
    forms = {key: search.forms(*key) for key in itertools.product(rank.RANKED, (2, 4))}
    assert {"bf16 autocast gelu 576->144", "fp16 gelu 729->196"} <= set(forms["pool_linear", 2])
    assert forms["dact_linear", 4] == ["tf32 dz, g and db", "tf32 dz"]
    products = [
        case
        for case in jit.cases()
        if not any(w in case for w in ("pool", "backward", "elementwise"))
    ]
    assert sorted(itertools.chain(*forms.values())) == sorted(products)


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="the interpreter compiles nothing")
def test_a_candidate_is_compiled_and_its_problems_told():
    """256 sums a thread do not fit into 255 registers; of another kernel, nobody asks."""
    case, config = "bf16 pool 576->64", Config({"PM": 8, "PK": 1024}, num_warps=1, num_stages=1)
    (problem,) = search._problems(case, 80, "pool", 2, config)
    assert re.fullmatch(rf"spills [1-9]\d* bytes in {case}", problem)
    with table.override("pool", 2, config):
        assert search._problems(case, 80, "pool_linear", 2, config) == []
    assert search._problems(case, 80, "pool", 2, config_for("pool", BF16, 80)) == []


@pytest.fixture
def compiler(monkeypatch):
    """Nothing is compiled; what ``problems`` says of a candidate and a case is what came out."""
    told = SimpleNamespace(problems=lambda *_: [], asked=[])

    def problems(case, arch, kernel, itemsize, config):
        told.asked.append((arch, kernel, itemsize, config, case))
        return told.problems(case, arch, kernel, itemsize, config)

    monkeypatch.setattr(search, "_problems", problems)
    monkeypatch.setattr(jit, "problem", lambda arch: None)
    monkeypatch.setattr(search.verbs, "unfenced", lambda arch: None)
    serial = nullcontext(SimpleNamespace(map=map))
    monkeypatch.setattr(search, "ProcessPoolExecutor", lambda *_, **__: serial)
    return told


def test_the_search_goes_on_to_the_first_that_ships(compiler):
    """The forward's fastest two on sm_90 spill, each in another form."""
    (_, first), (_, second), (_, third), *_ = rank.ranked("pool_linear", 2, 90)
    spills = {str(first): "bf16 linear 576->144", str(second): "fp16 gelu 729->196"}

    def problems(case, arch, kernel, itemsize, config):
        return ["spills 8 bytes in " + case] * (arch == 90 and spills.get(str(config)) == case)

    compiler.problems = problems
    found, asked = list(search.verdicts()), (90, "pool_linear", 2)
    entries = table.load(search.as_json(found))
    (entry,) = [each for each in entries if key(each) == asked]
    assert [each for each in entries if each.refused] == [entry]
    assert [(each.config, each.reason) for each in entry.refused] == [
        (first, "spills 8 bytes in bf16 linear 576->144"),
        (second, "spills 8 bytes in fp16 gelu 729->196"),
    ]
    assert entry.config == third
    compiled = [case for *where, case in compiler.asked if where == [*asked, third]]
    assert compiled == search.forms("pool_linear", 2)
    text = [str(verdict) for verdict in found if key(verdict) == asked]
    assert text[0].endswith(" us  spills 8 bytes in bf16 linear 576->144")
    assert text[0].startswith(f"sm_90 pool_linear 2 bytes  {first}  ")
    assert text[2].endswith(" us  ships")


def test_the_file_is_regenerated_byte_for_byte(compiler, monkeypatch):
    """If the compiler says what it said."""
    reasons = {(*key(e), str(each.config)): each.reason for e in RANKED for each in e.refused}

    def problems(case, arch, kernel, itemsize, config):
        reason = reasons.get((arch, kernel, itemsize, str(config)))
        return [] if reason is None else [reason]

    compiler.problems = problems
    text = table.FILE.read_text()
    monkeypatch.setattr(search.triton, "__version__", json.loads(text)["triton"])
    assert search.as_json(search.verdicts()) == text


def test_it_is_an_error_if_nothing_ships(compiler):
    compiler.problems = lambda *_: ["spills"]
    with pytest.raises(RuntimeError, match="no candidate for pool_linear on sm_80 ships"):
        list(search.verdicts())


def test_the_report_shows_the_fastest_that_was_refused(monkeypatch):
    refused = table.Refused(rank.candidates("pool_linear", 2)[0], 1.0, "spills 8 bytes in a form")
    monkeypatch.setattr(tables, "refused_for", lambda *_: (refused, None))
    lines = tables.report(["H100"]).splitlines()
    assert [line.split()[:2] for line in lines if line.startswith("H100 ")] == [
        *[["H100", "shipped"], ["H100", "refused"]],
        *(["H100", images] for images in ("1", "8", "64")),
        *[["H100", "shipped"], ["H100", "refused"]],
        ["H100", "90"],
        *[["H100", "shipped"], ["H100", "refused"]],
    ]
    assert any(line.endswith("stages=3  spills 8 bytes in a form") for line in lines)
