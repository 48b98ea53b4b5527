"""What Ctrl-C (SIGINT) and SIGTERM do.

A handler that raises is right as long as Python code runs; a library that is interrupted inside its C
code may make another exception of it, or none. Hence:

    a job has begun   the process ends at once and unwinds nothing. What is on disk is consistent at every
                      moment, as after kill -9, and the exit code says that the run can be resumed
    otherwise         KeyboardInterrupt, so that temporary files are removed; whatever exception arrives
                      in its place counts as the interruption
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from zq.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHOW_CURSOR = b"\x1b[?25h"  # a progress bar hides it


class Watch:
    """`seen`: a signal has arrived."""

    seen = False

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt


@contextmanager
def watched() -> Iterator[Watch]:
    """Inside, a signal raises KeyboardInterrupt and is remembered. Ignored signals (nohup) stay so."""
    watch = Watch()
    with _handled(watch):
        yield watch


@contextmanager
def resumable(output: Path, hint: str, as_json: bool = False) -> Iterator[None]:
    """Inside, once a job has begun in `output`, a signal ends the process with exit code 75, saying how
    to continue."""
    from zq.checkpoint.job import FOLDER, STATE

    def message() -> str | None:
        begun = (output / FOLDER / STATE).is_file()
        return f"interrupted; finished blocks are kept, continue with: {hint}" if begun else None

    with leaving(message, as_json):
        yield


@contextmanager
def leaving(message: Callable[[], str | None], as_json: bool = False) -> Iterator[None]:
    """Inside, a signal ends the process with exit code 75 and this message; where that is None, it does what
    it did outside."""
    before = signal.getsignal(signal.SIGTERM)

    def stop(signum: int, frame: FrameType | None) -> None:
        if (said := message()) is not None:
            _leave(Interrupted(said), as_json)
        if callable(before):
            before(signum, frame)

    with _handled(stop):
        yield


@contextmanager
def _handled(handler: Any) -> Iterator[None]:
    before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, handler)
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _leave(error: Interrupted, as_json: bool) -> None:
    """End the process from inside a signal handler: plain writes, as a buffered one may be under way."""
    if as_json:
        os.write(1, (json.dumps({"error": str(error), "exit_code": error.exit_code}) + "\n").encode())
    os.write(2, (SHOW_CURSOR if os.isatty(2) else b"") + f"error: {error}\n".encode())
    os._exit(error.exit_code)
