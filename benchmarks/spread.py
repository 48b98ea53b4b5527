"""Tasks over processes, one for each device named; a device named twice gets two.

The parent hands out tasks in their order and gets results as they come. A worker sees its GPU as the only
one.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

_worker: dict[str, Any] = {}


def spread(
    tasks: Sequence[Any],
    devices: Sequence[str],
    begin: Callable[[str], Any],
    work: Callable[[Any, Any], Any],
    seconds: float | None = None,
) -> Iterator[tuple[Any, Any, int]]:
    """(task, what work(begin(device), task) gave, how many other workers its device has), as they finish.

    `begin` runs once in each worker, with "cuda" or "cpu". After `seconds` what is not finished is dropped.
    Exits where a worker is killed.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    queue = context.SimpleQueue()
    for device in devices:
        queue.put((device, devices.count(device) - 1))
    share = max(1, (os.cpu_count() or 1) // len(devices))
    pool = ProcessPoolExecutor(len(devices), context, _begin, (queue, begin, share))
    futures = {pool.submit(_work, work, task): task for task in tasks}
    try:
        for future in as_completed(futures, timeout=seconds):
            found, beside = future.result()
            yield futures[future], found, beside
    except TimeoutError:
        print(f"stopped after {seconds:.0f} s; the same command continues", flush=True)
    except BrokenProcessPool:
        raise SystemExit(
            "a process was ended (out of memory?), see above; the same command continues"
        ) from None
    finally:
        for child in multiprocessing.active_children():
            child.kill()
        pool.shutdown(cancel_futures=True)


def _begin(queue: Any, begin: Callable[[str], Any], threads: int) -> None:
    device, beside = queue.get()
    if device.startswith("cuda"):  # before CUDA is first used here
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = int(device.partition(":")[2] or 0)
        os.environ["CUDA_VISIBLE_DEVICES"] = seen.split(",")[index] if seen else str(index)
    torch.set_num_threads(threads)
    _worker.update(beside=beside, made=begin(device.partition(":")[0]))


def _work(work: Callable[[Any, Any], Any], task: Any) -> tuple[Any, int]:
    return work(_worker["made"], task), _worker["beside"]
