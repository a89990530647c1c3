"""What was measured on this device? A file that ``tune`` writes and "auto" reads.

Its name has the device and a digest of all that a measurement holds for. So environments share a
folder, and what was measured with other versions is not found rather than misread.
"""

import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Mapping
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .. import kernels
from ..host import toolchain
from ..host.requirements import unwritable
from .call import Call
from .table import FILE

FORMAT = 1  # of the file; another one is foreign
Times = dict[str, float]  # microseconds by backend


def folder() -> Path:
    """Where the files are: ``$DECO_KERNELS_CACHE_DIR``, else in the user's folder of caches."""
    own = os.environ.get("DECO_KERNELS_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "deco_kernels"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _kernels() -> str:
    """A digest of all that is compiled: the kernels' source, of a checkout as of a release."""
    found = hashlib.sha256(f"{toolchain.digest():x}".encode())
    for file in sorted(Path(kernels.__file__).parent.glob("*.py")):
        found.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def key(index: int) -> dict[str, Any]:
    """All that a measurement on CUDA device ``index`` holds for."""
    p = torch.cuda.get_device_properties(index)
    return {
        "format": FORMAT,
        "kernels": _kernels(),
        "tiles": hashlib.sha256(FILE.read_bytes()).hexdigest()[:16],
        "device": f"{p.name}, {p.major}.{p.minor}, {p.multi_processor_count} SMs",
        "deco_kernels": _version("deco_kernels"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "system": platform.system(),
    }


def path(index: int) -> Path:
    """The file of CUDA device ``index``, for the versions that are here.

    Raises:
        RuntimeError: there is no home to have caches in.
    """
    name = re.sub(r"\W+", "-", torch.cuda.get_device_properties(index).name)
    digest = hashlib.sha256(json.dumps(key(index)).encode()).hexdigest()[:12]
    return folder() / f"{name}-{digest}.json"


@lru_cache(maxsize=64)
def load(index: int) -> Mapping[Call, Times]:
    """What the file of CUDA device ``index`` says; nothing, with a warning, if it is not for here.

    Read once a process, so that what "auto" takes does not change under a training.
    """
    try:
        file = path(index)
    except RuntimeError:  # nobody can have written there
        return {}
    try:
        return _read(file, key(index))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        text = f"{file} is ignored: {error}. `python -m deco_kernels tune` writes a new one"
        warnings.warn(text, stacklevel=2)
        return {}


def _read(file: Path, here: dict[str, Any]) -> dict[Call, Times]:
    """The entries of ``file``.

    Raises:
        OSError: it cannot be read.
        ValueError: it is corrupt, or was made by other versions or for another device.
    """
    try:
        content = json.loads(file.read_bytes())
        made, entries = dict(content["key"]), content["calls"]
        foreign = [name for name, value in here.items() if made.get(name) != value]
        calls = [] if foreign else entries
        found = {_call(entry["call"]): _times(entry["microseconds"]) for entry in calls}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is corrupt ({type(error).__name__}: {error})") from None
    for name in foreign:
        raise ValueError(f"it is for {name} {made.get(name)}, this is {here[name]}")
    return found


def _call(entry: dict[str, Any]) -> Call:
    call = Call(**{**entry, "dtype": getattr(torch, entry["dtype"])})
    for name, kind in Call.__annotations__.items():
        if not isinstance(getattr(call, name), (kind, int) if kind is float else kind):
            raise TypeError(f"{name} must be {kind.__name__}, is {getattr(call, name)!r}")
    return call


def _times(entry: dict[str, Any]) -> Times:
    times = {str(backend): float(us) for backend, us in entry.items()}
    if not times or not all(0 < us < float("inf") for us in times.values()):
        raise ValueError(f"microseconds must be positive, are {entry}")
    return times


def check_folder() -> None:
    """Try whether files can be written.

    Raises:
        OSError: they cannot; says what to set.
    """
    try:
        problem = unwritable(folder())
    except RuntimeError as error:  # there is no home to have a folder in
        problem = str(error)
    if problem:
        way_out = "set DECO_KERNELS_CACHE_DIR to a folder that can be written"
        raise OSError(f"measured times could not be kept: {problem}; {way_out}")


def store(index: int, measured: Mapping[Call, Times]) -> Path:
    """Add measurements to the file of CUDA device ``index``, in place of what is not for here.

    Raises:
        OSError: the file cannot be written.
    """
    from filelock import FileLock  # only a tool stores

    check_folder()
    file, here = path(index), key(index)
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        try:
            known = _read(file, here)
        except (OSError, ValueError):
            known = {}
        calls = [
            {
                "call": {**call._asdict(), "dtype": str(call.dtype).removeprefix("torch.")},
                "microseconds": times,
            }
            for call, times in {**known, **measured}.items()
        ]
        _replace(file, json.dumps({"key": here, "calls": calls}, indent=1))
    load.cache_clear()
    return file


def _replace(file: Path, text: str) -> None:
    """Other processes see the old file or the new one; it is as readable as any file."""
    new = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        new.write_text(text)
        os.replace(new, file)
    finally:
        new.unlink(missing_ok=True)
