"""What does a compiled kernel take of a chip, and what is there to take?"""

import re
import subprocess
import tempfile

# Bytes of shared memory that one thread block may use, by architecture: the CUDA C++ Programming
# Guide, "Compute Capabilities", "Maximum amount of shared memory per thread block" in KiB.
_LIMITS = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: 1024 * kib for arch, kib in _LIMITS.items()}

# PTX of a matrix product on tensor cores, the newest first: sm_90 knows mma.sync as well.
_TENSOR_CORES = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma.sync"}


def tensor_core(ptx: str) -> str | None:
    """The family of instructions that multiply matrices in ``ptx``."""
    return next((name for op, name in _TENSOR_CORES.items() if op in ptx), None)


def of_cubin(cubin: bytes) -> dict[str, int]:
    """``REG``, ``STACK`` and ``LOCAL`` of a thread, by the cuobjdump that Triton brings."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(size) for name, size in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
