"""Which tables are kept, and are they safe with streams and CUDA graphs?"""

import copy
import pickle
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from deco_kernels import Stencil
from deco_kernels.stencil import Table, places
from deco_kernels.stencil.kept import Kept
from deco_kernels.stencil.table import bytes_of

CUDA = torch.device("cuda", 0)


def test_the_oldest_are_dropped_beyond_the_budget():
    dropped = []
    kept = Kept(len, before_drop=dropped.append, budget=10)
    for key in ("a", "b", "c"):
        assert kept.get(key, lambda key=key: key * 4) == key * 4
    assert dropped == ["aaaa"]
    assert kept.get("b", lambda: "made again") == "bbbb"
    assert kept.get("a", lambda: "made again") == "made again"
    assert dropped == ["aaaa", "bbbb", "cccc"]


def test_what_is_larger_than_the_budget_is_kept_alone():
    kept = Kept(len, budget=3)
    for key in ("aaaa", "bbbb"):
        assert kept.get(key, lambda key=key: key) is kept.get(key, lambda: "made again")
    assert kept.get("aaaa", lambda: "made again") == "made again"


def test_tables_stay_within_the_budget(monkeypatch):
    kept = Kept(bytes_of, budget=300_000)
    monkeypatch.setattr(places, "_kept", kept)
    for side in range(2, 40):
        Stencil.adaptive((side, side), (6, 6)).tables()
    assert sum(map(bytes_of, kept._values.values())) <= 300_000
    assert len(kept._values) > 1


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device whose memory is the CPU's and whose stream and capture state the test sets."""
    state = SimpleNamespace(stream=1, capturing=False, waited=0)

    def wait(device) -> None:
        state.waited += 1

    def copied(table, device, dtype, non_blocking=False) -> Table:
        return table._replace(index=table.index.clone(), weight=table.weight.to(dtype, copy=True))

    monkeypatch.setattr(Table, "to", copied)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream)
    )
    monkeypatch.setattr(places, "_kept", Kept(bytes_of))
    monkeypatch.setattr(places, "_in_graphs", {})
    return state


def test_a_device_is_known_by_its_index(fake_cuda):
    for each in (Stencil.adaptive((4, 4), (2, 2)), Stencil.packed([(4, 4)], merge=2)):
        assert each.tables("cuda", torch.float32) is each.tables(CUDA, torch.float32)


def test_another_stream_makes_its_own_copy_of_a_pack(fake_cuda):
    pack = Stencil.packed([(4, 4), (6, 4)], merge=2)
    first = pack.tables(CUDA, torch.float32)
    assert pack.tables(CUDA, torch.float32) is first
    fake_cuda.stream = 2  # the copy may still be on its way
    second = pack.tables(CUDA, torch.float32)
    assert second[0].index is not first[0].index
    assert torch.equal(second[0].index, first[0].index)


def test_a_captured_graph_reads_a_packs_tables_of_before(fake_cuda):
    pack = Stencil.packed([(4, 4), (6, 6)], merge=2)
    first = pack.tables(CUDA, torch.float32)
    fake_cuda.stream, fake_cuda.capturing = 2, True  # captures begin when all streams are idle
    assert pack.tables(CUDA, torch.float32)[0].index is first[0].index
    with pytest.raises(RuntimeError, match=r"call tables\('cuda:0', torch.float64\) before"):
        pack.tables(CUDA, torch.float64)


def test_what_a_captured_graph_reads_is_never_dropped(fake_cuda, monkeypatch):
    grid = Stencil.adaptive((4, 4), (2, 2))
    first = grid.tables(CUDA, torch.float32)
    fake_cuda.capturing = True
    assert grid.tables(CUDA, torch.float32) is first
    fake_cuda.capturing = False
    monkeypatch.setattr(places, "_kept", Kept(bytes_of))
    assert [*places._in_graphs.values()] == [first]


def test_copies_carry_no_tables():
    position_ids = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])
    pack = Stencil.packed([(4, 4), (32, 32)], target=(2, 3), passthrough=1)
    pack.tables("meta", torch.float32)
    assert len(pickle.dumps(pack)) < 1000
    for each in (
        pack,
        Stencil.adaptive((4, 5), (2, 3)),
        Stencil.from_position_ids(position_ids, 2),
        Stencil.concat([Stencil.identity(2), pack]),
    ):
        for twin in (pickle.loads(pickle.dumps(each)), copy.deepcopy(each)):
            assert str(twin) == str(each)
            assert twin.lengths == each.lengths
            for ours, theirs in zip(twin.tables(), each.tables(), strict=True):
                assert torch.equal(ours.index, theirs.index)
                assert torch.equal(ours.weight, theirs.weight)
