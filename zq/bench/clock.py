"""Medians of wall time, and the peak of memory."""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LEAST, MOST = 3, 200  # runs of one call


def synchronize(device: str) -> None:
    """Wait for what a GPU has been given to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: str, seconds: float) -> list[float]:
    """Milliseconds of each run of `call`, which must be warm: at least LEAST runs, then more until they have
    taken `seconds` together."""
    spent: list[float] = []
    while len(spent) < LEAST or (sum(spent) < 1e3 * seconds and len(spent) < MOST):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        spent.append(1e3 * (time.perf_counter() - begin))
    return spent


def median(values: list[float]) -> float:
    return statistics.median(values)


class Memory:
    """Bytes on a GPU (torch.cuda.max_memory_allocated), or of the process (its resident set) on a CPU, from
    when this is made.

    held: at the beginning, which is the model and what is left of the batches before. peak: since then.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.device = device
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.held = torch.cuda.memory_allocated(device)
        else:
            self.resets = _reset()
            self.held = _status("VmRSS")

    def to_dict(self) -> dict[str, int | None]:
        """{"held", "peak", "reserved"}: the last for a GPU only, with graphs and what the allocator keeps."""
        if self.cuda:
            peak, kept = (
                f(self.device) for f in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
            )
            return {"held": self.held, "peak": peak, "reserved": kept}
        return {"held": self.held, "peak": _status("VmHWM") if self.resets else None, "reserved": None}


def _reset() -> bool:
    """Let Linux forget the peak of the resident set. Whether it did."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
