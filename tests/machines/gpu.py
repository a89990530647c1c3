"""A pytest plugin that rehearses the `gpu` tests on the CPU, which stands for the GPU.

"cuda" is the CPU, whose operators refuse what CUDA's refuse in deterministic mode: what the
documentation of ``torch.use_deterministic_algorithms`` lists, and matrix products without
``CUBLAS_WORKSPACE_CONFIG``. Every backend is eager's. Streams and graphs are names.

So it shows that the tests' own code and their oracle run, with figures that are right. It cannot
show our kernels and how they err, tensors of two devices in one operation, cuBLAS's figures, dtypes
under CUDA's autocast, captures and replays, or compiled code.
"""

import os
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from deco_kernels import backends
from deco_kernels.backends import eager

REFUSED = {
    *("avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward"),
    *("adaptive_max_pool2d_backward", "fractional_max_pool2d_backward"),
    *("fractional_max_pool3d_backward", "max_unpool2d", "max_unpool3d"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward"),
    *("_upsample_bicubic2d_aa_backward", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("reflection_pad3d_backward", "nll_loss2d_forward", "_ctc_loss_backward", "put", "histc"),
    *("bincount", "median", "grid_sampler_2d_backward", "grid_sampler_3d_backward"),
}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"}
DETERMINISTIC = ":4096:8", ":16:8"  # CUBLAS_WORKSPACE_CONFIG


class Refuses(TorchDispatchMode):
    """Operators that CUDA has no deterministic implementation of."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2].rstrip("_")
        fixed = os.environ.get("CUBLAS_WORKSPACE_CONFIG") in DETERMINISTIC
        if torch.are_deterministic_algorithms_enabled() and (
            name in REFUSED or (name in PRODUCTS and not fixed)
        ):
            text = f"{name} does not have a deterministic implementation, but you set"
            if not torch.is_deterministic_algorithms_warn_only_enabled():
                raise RuntimeError(text)
            warnings.warn(text, stacklevel=2)
        return func(*args, **(kwargs or {}))


class OnCpu(TorchFunctionMode):
    """Calls that name a CUDA device."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        def place(value):
            return "cpu" if str(value).startswith("cuda") else value

        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = place(kwargs["device"])
        if func is torch.Tensor.to:
            args = [args[0], *map(place, args[1:])]
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


class Stream:
    def wait_stream(self, other):
        pass


class Graph:
    def replay(self):
        pass


def pytest_configure():
    """Before the tests' modules ask whether there is a GPU."""
    autocast = torch.autocast
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = lambda: None
    torch.cuda.CUDAGraph, torch.cuda.Stream, torch.cuda.current_stream = Graph, Stream, Stream
    torch.cuda.graph = torch.cuda.stream = torch.cuda.device = nullcontext
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.autocast = lambda device, dtype: autocast("cpu", dtype)
    torch.compile = lambda module, mode: module
    backends._MODULES.update(dict.fromkeys(("triton", "cuda", "composed"), eager))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    with OnCpu(), Refuses():
        return (yield)
