"""What repeats, as CUDA graphs: the kernels of a small block take less time than their launches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

FEWEST = 8  # batches that are worth a recording, which takes the time of about four

Run = Callable[[Tensor, int], Tensor]


def recorded(step: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """`step`, recorded as a CUDA graph; itself on a CPU.

    It runs three times while it is recorded: what it changes must not depend on that. Every call gives the
    same tensor with new values.
    """
    if device.type != "cuda":
        return step
    side = _beside(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        result = step()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


@lru_cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all recordings: cuBLAS keeps a workspace of 32 MB for every stream that it has seen."""
    return torch.cuda.Stream(device)


def on_each(run: Run, batches: list[Tensor], which: Iterable[int], calls: list[Any]) -> Iterator[Tensor]:
    """run(batches[i], i) for the indices `which`, without gradients; `run` must change nothing.

    On a GPU one recording serves all batches that have the shape of the first and the same `calls` (what
    else `run` gives to the block).
    """
    chosen = list(which)
    play, given = None, torch.empty(0)
    if len(chosen) >= FEWEST and batches[chosen[0]].is_cuda:
        first = chosen[0]
        given = batches[first].clone()
        play = recorded(lambda: run(given, first), given.device)
    for i in chosen:
        batch = batches[i]
        if play is None or batch.shape != given.shape or not _same(calls[i], calls[chosen[0]]):
            yield run(batch, i)
        else:
            given.copy_(batch)
            yield play().clone()


def _same(a: Any, b: Any) -> bool:
    """Whether two calls hold the same tensors, and equal values otherwise."""
    (mine, shape), (other, as_shape) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return shape == as_shape and all(
        x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else bool(x == y)
        for x, y in zip(mine, other, strict=True)
    )
