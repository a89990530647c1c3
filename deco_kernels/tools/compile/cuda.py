"""What do the CUDA C++ kernels take of a chip? nvcc compiles them, ptxas reports."""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...host import toolchain
from ...kernels.resources import SHARED_LIMIT, tensor_core
from . import Row, Step

SOURCES = [name for name in toolchain.SOURCES if name.endswith(".cu")]
_CASES = {"Bfloat": "bf16", "Half": "fp16", "Float": "fp32"}  # by the C++ type of the elements
_FROM_SM80 = ("bf16", "tf32")  # the backend asks earlier GPUs for neither


class Compiled(NamedTuple):
    """A source file for one architecture."""

    source: str
    ptx: str
    report: str  # ptxas's
    cubin_bytes: int


def problem(arch: int) -> str | None:
    """Why nothing can be compiled here for ``arch``; None if something can."""
    nvcc = toolchain.nvcc()
    if nvcc is None:
        return toolchain.missing()
    if f"compute_{arch}" in toolchain.ask(nvcc, "--list-gpu-arch").split():
        return None
    return f"nvcc {toolchain.cuda_version(nvcc)} does not know the architecture"


def count_steps(archs: Sequence[int]) -> int:
    return len(archs)


def steps(archs: Sequence[int]) -> Iterator[Step]:
    """All files for one architecture after the other; some files at a time."""
    workers = min(os.cpu_count() or 1, len(SOURCES))
    with ThreadPoolExecutor(workers) as pool:
        for arch in archs:
            start = time.monotonic()
            done = list(pool.map(partial(compiled, arch=arch), SOURCES))
            seconds = time.monotonic() - start
            size = sum(one.cubin_bytes for one in done) / 1024
            yield Step(
                [row for one in done for row in rows(one, arch)],
                f"sm_{arch}: all {len(SOURCES)} CUDA files to cubins in {seconds:.1f} s of wall "
                f"time, {workers} at a time; {size:.0f} KiB",
            )


def compiled(source: str, arch: int) -> Compiled:
    """Compile a file as the library does, but by way of PTX.

    Raises:
        RuntimeError: nvcc failed; says at what.
    """
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        _nvcc(arch, "-std=c++17", "-ptx", toolchain.folder() / source, "-o", ptx)
        # ptxas would only warn of launch bounds that it ignores.
        report = _nvcc(arch, "-cubin", "-Xptxas", "-v,-Werror", ptx, "-o", cubin)
        return Compiled(source, ptx.read_text(), report, cubin.stat().st_size)


def _nvcc(arch: int, *arguments: str | Path) -> str:
    command = [toolchain.nvcc(), *toolchain.FLAGS["nvcc"], f"-arch=sm_{arch}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["it does not say why"]
        first = next((line for line in lines if re.search("error|fatal", line)), lines[-1])
        raise RuntimeError(f"nvcc failed for sm_{arch}: {first}")
    return done.stderr


def rows(done: Compiled, arch: int) -> list[Row]:
    """The kernels of a file that the backend launches on ``arch``."""
    source = (toolchain.folder() / done.source).read_text(encoding="utf-8")
    params = (toolchain.folder() / "params.h").read_text(encoding="utf-8")
    literals = re.findall(r"^constexpr int (\w+) = (\d+);", params + source, re.M)
    constants = {name: int(value) for name, value in literals}
    dynamic = constants["SHARED_BYTES"] if "DYN_SHARED" in source else 0
    entries = re.split(r"\.entry (\w+)\(", done.ptx)  # what is before, name, text, name, text
    ptx_of = dict(zip(entries[1::2], entries[2::2], strict=True))
    reports = re.split(r"Compiling entry function '(\w+)'", done.report)
    found = []
    for symbol, report in zip(reports[1::2], reports[2::2], strict=True):
        kernel, case = name_of(symbol)
        if arch < 80 and case in _FROM_SM80:
            continue
        core, threads = tensor_core(ptx_of[symbol]), re.search(r"\.maxntid (\d+)", ptx_of[symbol])
        config = f"{threads[1]} threads" if threads else "-"
        if "STAGES" in constants:
            tile = f"{constants['PANEL_ROWS']}x{constants['COLUMNS']}"
            config = f"{tile}, {constants['STAGES']} stages, {config}"
        row = Row(
            kernel=kernel,
            backend="cuda",
            arch=arch,
            config=config,
            registers=_most(report, "Used # registers"),
            # Also those of functions that it calls. No frame and yet spills: to shared memory.
            spill_bytes=_most(report, "# bytes (?:stack frame|cumulative stack size)")
            or _most(report, "# bytes spill (?:stores|loads)"),
            shared_bytes=_most(report, "# bytes smem") + dynamic,
            shared_limit=SHARED_LIMIT[arch],
            tensor_core=core,
            case=case,
            compiler=f"nvcc {toolchain.cuda_version(toolchain.nvcc())}",
        )
        found.append(row)
    return found


def name_of(symbol: str) -> tuple[str, str]:
    """The kernel and the case that a mangled name stands for.

    Raises:
        RuntimeError: it is not the name of a kernel template of one element type.
    """
    match = re.match(r"_ZN4deco\d+(\w+)_kernelINS_\d+(\w+?)EEEvNS_6ParamsE$", symbol)
    if match is None or match[2] not in _CASES:
        raise RuntimeError(f"{symbol} is not the name of a kernel of one element type")
    kernel, case = match[1], _CASES[match[2]]
    return kernel, "tf32" if (kernel, case) == ("pool_linear", "fp32") else case


def _most(report: str, pattern: str) -> int:
    """The greatest number where ``pattern`` has a #; 0 if there is none."""
    return max(map(int, re.findall(pattern.replace("#", r"(\d+)"), report)), default=0)
