"""Which kernels (on a CPU: operators) a pass takes its time for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

SKIP, STEPS, SHOWN = 3, 4, 15


def traced(call: Callable[[], Any], wanted: bool, device: str) -> dict[str, Any]:
    """{"profile": of one run of `call`}, or {}."""
    if not wanted:
        return {}
    with _profile(device) as found:
        call()
    return {"profile": _summary(found, device, 1)}


class Trace:
    """A logits processor that changes nothing: it records steps SKIP to SKIP + STEPS of `generate`."""

    def __init__(self, device: str) -> None:
        self.device, self.calls = device, 0
        self.found = _profile(device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == SKIP:
            self.found.start()
        elif self.calls == SKIP + STEPS:
            self.found.stop()
        return scores

    def summary(self) -> dict[str, Any] | None:
        """Of one step; None where `generate` was too short."""
        if self.calls < SKIP + STEPS:
            if self.calls >= SKIP:
                self.found.stop()
            return None
        return _summary(self.found, self.device, STEPS)


def _profile(device: str) -> Any:
    cuda = device.startswith("cuda")
    return profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU])


def _summary(found: Any, device: str, steps: int) -> dict[str, Any]:
    """{"launches", "busy_ms", "top": [{"name", "calls", "ms"}]} of a step."""
    cuda = device.startswith("cuda")
    spent = []
    for event in found.key_averages():
        if cuda != str(event.device_type).endswith("CUDA"):
            continue
        us = event.self_device_time_total if cuda else event.self_cpu_time_total
        spent.append({"name": event.key[:160], "calls": event.count / steps, "ms": us / 1e3 / steps})
    spent.sort(key=lambda each: -each["ms"])
    return {
        "launches": sum(each["calls"] for each in spent),
        "busy_ms": sum(each["ms"] for each in spent),
        "top": spent[:SHOWN],
    }
