"""What was measured on this device? One file a device, that ``tune`` writes and "auto" reads."""

import json
import os
import platform
import re
import tempfile
import warnings
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .call import Call

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


def key(index: int) -> dict[str, Any]:
    """All that a measurement on CUDA device ``index`` holds for."""
    p = torch.cuda.get_device_properties(index)
    return {
        "format": FORMAT,
        "device": f"{p.name}, {p.major}.{p.minor}, {p.multi_processor_count} SMs",
        "deco_kernels": _version("deco_kernels"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "system": platform.system(),
    }


def path(index: int) -> Path:
    """The file of CUDA device ``index``; devices of one name share it."""
    name = re.sub(r"\W+", "-", torch.cuda.get_device_properties(index).name)
    return folder() / f"{name}.json"


def load(index: int) -> Mapping[Call, Times]:
    """What the file of CUDA device ``index`` says; nothing, with a warning, if it is not for here.

    Read once a process and file, so that what "auto" takes does not change under a training.
    """
    return _load(index, path(index))


@lru_cache(maxsize=64)
def _load(index: int, file: Path) -> Mapping[Call, Times]:
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
        made, entries = content["key"], content["calls"]
        found = {_call(entry["call"]): _times(entry["microseconds"]) for entry in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it is corrupt ({type(error).__name__}: {error})") from None
    for name, value in here.items():
        if made.get(name) != value:
            raise ValueError(f"it is for {name} {made.get(name)}, this is {value}")
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


def store(index: int, measured: Mapping[Call, Times]) -> Path:
    """Add measurements to the file of CUDA device ``index``, in place of what is not for here.

    Other processes see the old file or the new one.

    Raises:
        OSError: the file cannot be written.
    """
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
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as new:
            json.dump({"key": here, "calls": calls}, new, indent=1)
        os.replace(new.name, file)
    _load.cache_clear()
    return file
