"""What the tests of decode steps, prompts and texts watch."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.runtime.quantized import force_kernels
from tests.runtime.stepping import NoHost, Seen
from zq.runtime import graphs


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Counter[str]]]:
    """Of each static step that was made: whether attention was zq's own, and its operators."""
    force_kernels(monkeypatch)
    made: list[tuple[bool, Counter[str]]] = []
    original = graphs.static_step

    def watched(forward: Any, cache: Any, buffers: Any, *more: Any) -> Any:
        with NoHost(), Seen() as seen:
            out = original(forward, cache, buffers, *more)
        made.append((buffers.own, +seen.ops))
        return out

    monkeypatch.setattr(graphs, "static_step", watched)
    return made


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the prompts and texts that were read; nothing is asked of the host meanwhile."""
    force_kernels(monkeypatch)
    shapes: list[tuple[int, ...]] = []
    original = graphs.prompt_step

    def watched(forward: Any, cache: Any, buffers: Any, *more: Any) -> Any:
        shapes.append(tuple(buffers.ids.shape))
        with NoHost():
            return original(forward, cache, buffers, *more)

    monkeypatch.setattr(graphs, "prompt_step", watched)
    return shapes
