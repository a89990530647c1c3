"""What does a build at first use lack on this machine: a folder, a compiler, headers?"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import lru_cache
from pathlib import Path


def unwritable(folder: Path) -> str | None:
    """Why no files can be made in ``folder``, which need not exist yet; None if they can.

    It tries: permissions do not tell of quotas and read-only mounts. What it makes it deletes.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.TemporaryDirectory(prefix=".deco_kernels-", dir=there):
            return None
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror or error})"


@lru_cache
def triton_lacks() -> str | None:
    """Why Triton could not launch our kernels on a GPU of this machine; None if nothing is known.

    Asked once a process, before the first launch, which would compile a C stub of the driver and
    write to Triton's cache. What an earlier process left there needs no compiler and no writing.
    """
    if sys.platform != "linux":  # Triton itself is for Linux; forks bring compilers of their own
        return None
    from triton import knobs
    from triton.backends.nvidia import driver

    folder = Path(knobs.cache.dir)
    problem = unwritable(folder) if knobs.cache.dir else "TRITON_CACHE_DIR is empty"
    if problem and not _kept(folder, "cuda_utils*", "pool*_kernel.json"):
        return f"{problem}; set TRITON_CACHE_DIR or TRITON_HOME to a folder that can be"
    problem = None if knobs.build.impl else _no_compiler()
    # Triton 3.5 and 3.6 compile a launcher for every kernel, too.
    launchers = ["__triton_launcher*"] if hasattr(driver, "compile_module_from_src") else []
    return None if problem and _kept(folder, "cuda_utils*", *launchers) else problem


def _kept(folder: Path, *names: str) -> bool:
    """Whether Triton's cache has files of all these names."""
    return all(any(folder.glob(f"*/{name}")) for name in names)


def _no_compiler() -> str | None:
    """Why Triton cannot compile C; it takes ``CC`` as the name of a program, then gcc, clang."""
    named = os.environ.get("CC")
    if named is None:
        compiler = shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            return "Triton needs a C compiler and found none (install gcc or clang, or set CC)"
    else:
        compiler = shutil.which(named)
        if compiler is None:
            return f"Triton needs a C compiler, and CC names {named!r}, which was not found"
    # posix_prefix: where Debian's Python has its headers is not where it installs packages.
    include = sysconfig.get_path("include", "posix_prefix")
    command = compiler, "-E", "-x", "c", "-include", "Python.h", f"-I{include}", os.devnull
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode == 0:
        return None
    said = next((line for line in run.stderr.splitlines() if "error" in line), run.stderr.strip())
    return (
        f"Triton's C compiler {compiler} cannot read Python's headers ({said}); "
        "install python3-dev or python3-devel, or name their folder in C_INCLUDE_PATH"
    )
