"""One child process for each engine, which measures batch after batch; rows reach the parent as they come.

A child of its own, so that memory is that of one model, and so that what breaks or hangs takes nothing else
along. Ctrl-C or the time limit ends it at once; the rows so far are kept.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from os import _exit
from typing import Any

import torch

from zq.bench.subject import Subject
from zq.bench.task import Task, measure, tidy
from zq.errors import ZqError

Row = dict[str, Any]
SECONDS = 10  # for a child that is done to end by itself
LATE = "not measured: the time limit was reached"


def run(
    subject: Subject,
    task: Task,
    engines: Sequence[str],
    batches: Sequence[int],
    limit: float | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Generator[Row, None, None]:
    """Yields a row for each engine and batch: {"engine", "batch", "dtype", "load_s", ...} with the figures of
    `measure`, or with "error" in one line. limit: seconds for all together."""
    end = None if limit is None else time.monotonic() + limit
    for engine in engines:
        if end is not None and time.monotonic() > end:
            yield from ({"engine": engine, "batch": batch, "error": LATE} for batch in batches)
            continue
        progress(f"{engine}: loading")
        left, message = list(batches), {}
        child, ours = _start(subject, task, engine, batches)
        try:
            while left:
                message = _receive(child, ours, end)
                if "note" in message:
                    progress(f"{engine}: {message['note']}")
                    continue
                found = left[:1] if "row" in message else left[:]
                del left[: len(found)]
                yield from ({"engine": engine, "batch": b, **message.get("row", message)} for b in found)
            if "row" in message:
                child.join(SECONDS)
        finally:
            child.kill()
            child.join()
            ours.close()


def _start(subject: Subject, task: Task, engine: str, batches: Sequence[int]) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    ours, theirs = context.Pipe()
    child = context.Process(target=_serve, args=(theirs, subject, task, engine, list(batches)), daemon=True)
    child.start()
    theirs.close()
    return child, ours


def _receive(child: Any, ours: Connection, end: float | None) -> dict[str, Any]:
    """{"row"}, {"note"}, or {"error"} of everything that is left."""
    seconds = None if end is None else max(0.0, end - time.monotonic())
    if not wait([ours], seconds):
        return {"error": LATE}
    try:
        return ours.recv()
    except (EOFError, OSError):
        child.join()
        code = child.exitcode or 0
        how = f"was killed (signal {-code}, out of memory?)" if code < 0 else f"ended with code {code}"
        return {"error": f"the process {how}"}


def _serve(pipe: Connection, subject: Subject, task: Task, engine: str, batches: list[int]) -> None:
    """A child: notes and rows go out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    begin = time.perf_counter()
    try:
        model = subject.build(engine, task.device)
    except Exception as error:
        pipe.send({"error": _line(error)})
        return
    facts: Row = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "load_s": round(time.perf_counter() - begin, 2),
    }
    if engine == "zq":
        facts["optimized"] = str(model.zq_fused).splitlines()
    for batch in batches:
        pipe.send({"note": f"batch {batch}"})
        try:
            row = measure(model, engine, task, batch)
        except Exception as error:
            row = {"error": _line(error)}
        pipe.send({"row": {**facts, **row}})
        tidy(model)


def _line(error: Exception) -> str:
    """The first line of an error. What is nobody's fault but zq's or torch's is shown whole as well."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if not isinstance(error, ZqError):
        traceback.print_exception(error)
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ZqError) else f"{type(error).__name__}: {text}"


def _end_with(parent: int) -> None:
    """Wait until the parent is gone, then end this process."""
    wait([parent])
    _exit(1)
