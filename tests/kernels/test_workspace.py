"""Is the dataflow kernel's workspace safe with streams and CUDA graphs?"""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from deco_kernels import FusedAvgPoolProjector, backends
from deco_kernels.kernels import workspace
from deco_kernels.kernels.launch import Chip, stand_in

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_cuda(monkeypatch):
    """A device whose memory is the CPU's and whose stream and capture state the test sets."""
    state = SimpleNamespace(stream=0, capturing=False, made=[])
    zeros = torch.zeros

    def make(size, dtype, device):
        state.made.append(threading.get_ident())
        return zeros(size, dtype=dtype)

    monkeypatch.setattr(workspace, "_kept", {})
    monkeypatch.setattr(torch, "zeros", make)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream)
    )
    return state


def test_launches_of_one_stream_share_a_buffer(fake_cuda):
    first = workspace.workspace_for(CUDA, 10)
    assert workspace.workspace_for(CUDA, 1000) is first
    assert len(first) >= 1000
    assert not first.count_nonzero()


def test_streams_do_not_share(fake_cuda):
    first = workspace.workspace_for(CUDA, 10)
    fake_cuda.stream = 7
    assert workspace.workspace_for(CUDA, 10) is not first
    fake_cuda.stream = 0
    assert workspace.workspace_for(CUDA, 10) is first


def test_it_grows(fake_cuda):
    first = workspace.workspace_for(CUDA, 10)
    larger = workspace.workspace_for(CUDA, 5000)
    assert len(larger) >= 5000 > len(first)
    assert workspace.workspace_for(CUDA, 10) is larger


def test_a_captured_graph_has_its_own(fake_cuda):
    kept = workspace.workspace_for(CUDA, 10)
    fake_cuda.capturing = True
    captured = [workspace.workspace_for(CUDA, 10) for _ in range(2)]
    fake_cuda.capturing = False
    assert workspace.workspace_for(CUDA, 10) is kept
    assert len({id(t) for t in (kept, *captured)}) == 3
    # A graph's memory must be the graph's: made in the capturing thread, in its pool.
    assert fake_cuda.made[1:] == [threading.get_ident()] * 2


def test_what_is_kept_is_made_outside_this_threads_memory_pool(fake_cuda):
    workspace.workspace_for(CUDA, 10)
    assert fake_cuda.made[0] != threading.get_ident()


def projector(backend):
    return FusedAvgPoolProjector(2, 144, 256, 512, backend=backend).half()


def skip_without(backend):
    problem = backends.unusable(backend, CUDA, torch.float16)
    if problem:
        pytest.skip(problem)


def test_what_is_compiled_on_a_gpu_is_traced_whole():
    """Without a GPU, what torch.compile does before it compiles; nothing is launched."""
    pytest.importorskip("triton")
    x = torch.randn(4, 576, 256).half()
    with torch.no_grad(), stand_in(Chip(90, 132), lambda *launch: None):
        compiled = torch.compile(projector("triton"), backend="aot_eager", fullgraph=True)
        assert compiled(x).shape == (4, 144, 512)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_replays_and_streams_on_a_gpu(backend):
    skip_without(backend)
    fused, x = projector(backend).cuda(), torch.randn(4, 576, 256, device="cuda").half()
    with torch.no_grad():
        want = fused(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fused(x)
        streams = [torch.cuda.Stream() for _ in range(3)]
        for _ in range(10):
            graph.replay()
            outputs = []
            for stream in streams:
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    outputs.append(fused(x))
            torch.cuda.synchronize()
            assert all(torch.equal(y, want) for y in (captured, *outputs))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_graphs_of_a_compiled_projector_on_a_gpu(backend):
    skip_without(backend)
    pytest.importorskip("triton", reason="Inductor needs Triton on a GPU")
    fused, x = projector(backend).cuda(), torch.randn(4, 576, 256, device="cuda").half()
    with torch.no_grad():
        want = fused(x)
        compiled = torch.compile(fused, mode="reduce-overhead")
        for _ in range(4):
            # Inductor may add a bias after it rounded the product.
            torch.testing.assert_close(compiled(x).clone(), want, rtol=2e-3, atol=2e-3)
