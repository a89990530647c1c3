"""How is a step run? As a process of its own: a time limit, and its output in a file."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

GRACE = 10.0  # seconds that a process has to write down what it has, once it is told to stop


class Ended(NamedTuple):
    """How a process ended; ``code`` is None if it was stopped at its limit."""

    code: int | None
    seconds: float


def run(command: Sequence[str], log: Path, limit: float, folder: Path | None = None) -> Ended:
    """Run ``command`` in ``folder``, its output and errors in ``log``, for ``limit`` seconds.

    What stops the caller stops the process too, with all that it started.
    """
    start = time.monotonic()
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its own children can be stopped with it
        )
        try:
            code = child.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _stop(child)
    return Ended(code, time.monotonic() - start)


def _stop(child: subprocess.Popen) -> None:
    """Interrupt it, as the keyboard would: pytest then writes down what it has. Then kill it."""
    try:
        if child.poll() is None:
            child.send_signal(signal.SIGINT)
            child.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with suppress(ProcessLookupError, PermissionError):  # if nothing is left of it
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, as SIGINT does, also where the shell ignores that."""
    kept = {n: signal.signal(n, _interrupt) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def scrub(text: str, places: dict[Path, str]) -> str:
    """``text`` without this machine's folders, and of a progress bar only its last state.

    ``places`` maps more folders to what is written in their place.
    """
    known = {
        Path(sys.prefix): "<python>",
        Path(sys.base_prefix): "<python>",
        Path(tempfile.gettempdir()): "<tmp>",
        Path.home(): "~",
        **places,
    }
    names = {str(p): name for path, name in known.items() for p in (path, path.resolve())}
    for place in sorted(names, key=len, reverse=True):
        if place != os.sep:
            text = re.sub(rf"{re.escape(place)}(?![\w-])", lambda _, p=place: names[p], text)
    return "\n".join(line.rpartition("\r")[2].rstrip() for line in text.split("\n"))
