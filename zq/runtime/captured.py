"""A call that is captured in a CUDA graph when it comes again."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch


class Place:
    """A memory pool and a stream to capture on. What a kernel needs once on a stream (counters, workspaces)
    is made by running there first, and is then no part of a graph."""

    def __init__(self) -> None:
        self.pool: Any = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()

    def run(self, step: Callable[[], Any]) -> Any:
        here = torch.cuda.current_stream()
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            out = step()
        here.wait_stream(self.stream)
        return out


class Captured:
    """A call that was seen `calls` times: its static buffers; after the first `eager` ones its graph, and
    what that returns."""

    def __init__(self, buffers: Any, eager: int = 1) -> None:
        self.buffers, self.eager = buffers, eager
        self.graph: Any = None
        self.out: Any = None
        self.calls = 0
        self.failed = False

    def run(self, step: Callable[[], Any], place: Place | None) -> Any:
        """`step` reads the buffers and returns a ModelOutput whose tensors are then new ones. place: where to
        capture; None: nowhere."""
        self.calls += 1
        if place is None or self.failed:
            return step()
        if self.calls <= self.eager:
            out = place.run(step)
            # Tuples are hidden states, where config.json asks for them.
            self.failed = not all(torch.is_tensor(x) for x in out.values())
            return out if self.failed else _copied(out)
        if self.graph is None and not self._capture(step, place):
            return step()
        graph: Any = self.graph
        graph.replay()
        return _copied(self.out)

    def _capture(self, step: Callable[[], Any], place: Place) -> bool:
        """Capturing runs nothing, so the caches are as before."""
        graph = torch.cuda.CUDAGraph()
        given: dict[str, Any] = {"capture_error_mode": "thread_local"}  # other threads do as they like
        try:
            with torch.cuda.graph(graph, pool=place.pool, stream=place.stream, **given):
                self.out = step()
        except RuntimeError as error:
            self.failed = True
            text = str(error).splitlines()[0]
            warnings.warn(f"zq: no CUDA graph for calls of this shape: {text}", stacklevel=2)
            return False
        self.graph = graph
        return True


def _copied(out: Any) -> Any:
    return type(out)(**{name: x.clone() for name, x in out.items()})
