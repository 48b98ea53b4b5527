"""Measure the cells that are missing, on one device or several, and append each as it is finished.

One process per device; the parent hands out cells one by one, in the order of the grid, and alone writes.
With one device everything runs in this process. A child ends by itself when its parent is gone, however that
ended.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from zq.errors import AuditError, Interrupted, OutputError, OutputKept, ZqError
from zq.recipe import Recipe
from zq.sweep.grid import Cell
from zq.sweep.measure import Bench
from zq.sweep.store import Row, Store
from zq.sweep.subjects import Subject

SCRATCH = ".cells"
Task = tuple[Subject, Cell]
Outcome = tuple[Cell, "Row | ZqError"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is the same for all cells."""

    base: Recipe
    setting: dict[str, Any]
    devices: list[str]


def sweep(
    tasks: Sequence[Task],
    work: Work,
    store: Store,
    progress: Callable[[dict[str, Any]], None] = lambda event: None,
) -> list[tuple[Cell, ZqError]]:
    """Measure `tasks` and append a row for each; what could not be measured, and why.

    `progress` gets {"cell", "row" or "error", "done", "of", "left"} after each, "left" in seconds. Raises
    OutputKept (disk), AuditError, or Interrupted when a process was killed; finished cells are kept.
    """
    scratch = store.path.parent / SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    failed: list[tuple[Cell, ZqError]] = []
    begun = time.monotonic()
    try:
        # Closed at once when something is raised here: its processes write into the scratch folder.
        with closing((_here if len(work.devices) == 1 else _apart)(tasks, work, scratch)) as outcomes:
            for done, (cell, found) in enumerate(outcomes, start=1):
                left = (time.monotonic() - begun) / done * (len(tasks) - done)
                event = {"cell": cell, "done": done, "of": len(tasks), "left": left}
                if isinstance(found, (AuditError, OutputError)):
                    raise found
                if isinstance(found, ZqError):
                    failed.append((cell, found))
                    progress({**event, "error": str(found)})
                else:
                    store.add(found)
                    progress({**event, "row": found})
    except OutputError as error:
        raise OutputKept(f"{error}; finished cells are kept, the same command continues") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return failed


def stop(out: Path) -> None:
    """End the children at once and remove what they had not finished; results.jsonl stays as it is."""
    for child in multiprocessing.active_children():
        child.kill()
        child.join()
    shutil.rmtree(out / SCRATCH, ignore_errors=True)


def _here(tasks: Sequence[Task], work: Work, scratch: Path) -> Generator[Outcome, None, None]:
    bench = Bench(work.devices[0], work.setting, work.base, scratch / "0")
    for subject, cell in tasks:
        try:
            yield cell, bench.measure(subject, cell)
        except ZqError as error:
            yield cell, error


def _apart(tasks: Sequence[Task], work: Work, scratch: Path) -> Generator[Outcome, None, None]:
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    queue = deque(tasks)
    children: dict[Connection, tuple[Any, str]] = {}
    busy: dict[Connection, Cell] = {}
    try:
        for number, device in enumerate(work.devices[: len(tasks)]):
            ours, theirs = context.Pipe()
            arguments = (theirs, device, work, scratch / str(number))
            child = context.Process(target=_serve, args=arguments, daemon=True)
            child.start()
            theirs.close()
            children[ours] = child, device
            busy[ours] = _hand_out(ours, queue)
        while busy:
            for ours in wait(list(busy)):
                assert isinstance(ours, Connection)
                cell = busy.pop(ours)
                try:
                    found = ours.recv()
                except (EOFError, OSError):
                    raise _ended(*children[ours], cell) from None
                yield cell, found
                if queue:
                    try:
                        busy[ours] = _hand_out(ours, queue)
                    except OSError:
                        raise _ended(*children[ours], cell) from None
    finally:
        for child, _ in children.values():
            child.terminate()
            child.join()


def _hand_out(ours: Connection, queue: deque[Task]) -> Cell:
    task = queue.popleft()
    ours.send(task)
    return task[1]


def _ended(child: Any, device: str, cell: Cell) -> Exception:
    child.join()
    if child.exitcode is not None and child.exitcode < 0:
        return Interrupted(
            f"the process on {device} was killed (signal {-child.exitcode}, out of memory?) at {cell}; "
            "finished cells are kept, the same command continues"
        )
    return RuntimeError(f"the process on {device} ended with code {child.exitcode} at {cell}; see above")


def _serve(pipe: Connection, device: str, work: Work, scratch: Path) -> None:
    """A child: cells come in, rows or errors go out, until the parent ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent answers it
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // len(work.devices)))  # audits run on the CPU
    if device != "cpu":
        torch.cuda.set_device(device)  # for what takes the current one, whatever its tensors are on
    bench = Bench(device, work.setting, work.base, scratch)
    while True:
        subject, cell = pipe.recv()
        try:
            pipe.send(bench.measure(subject, cell))
        except ZqError as error:
            pipe.send(error)


def _end_with(parent: int) -> None:
    """Wait until the parent is gone, then end this process."""
    wait([parent])
    os._exit(1)
