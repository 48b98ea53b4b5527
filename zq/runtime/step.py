"""A decode step over static buffers: one new token in each row, a StaticCache, nothing that is read on the
host. It can be run as it is, or captured and replayed (graphs.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer


class Buffers:
    """What a step reads.

    ids, positions  int64 [B, 1]
    mask            int64 [B, L]: 1 where a position of the cache may be seen, if it lies before the present
    """

    def __init__(self, batch: int, length: int, device: torch.device) -> None:
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.mask = torch.ones(batch, length, dtype=torch.int64, device=device)

    def fill(self, ids: Tensor, positions: Tensor | None, mask: Tensor | None) -> None:
        """ids [B, 1]; positions [B or 1, 1], None where the model takes none; mask [B, <= L], None: all."""
        self.ids.copy_(ids)
        if positions is not None:
            self.positions.copy_(positions)
        if mask is None:
            self.mask.fill_(1)
        else:
            self.mask[:, : mask.shape[1]].copy_(mask)
            self.mask[:, mask.shape[1] :].zero_()


class Step:
    """The step that is being made, for the blocks that know of it."""

    def __init__(self, cache: StaticCache, mask: Tensor) -> None:
        self.cache, self.mask = cache, mask
        length: Any = cache.layers[0].cumulative_length  # type: ignore[union-attr]
        self.position: Tensor = length.reshape(1).clone()
        self._written: list[Tensor] = []
        self._first: Tensor | None = None
        self._added: tuple[Tensor, Tensor] | None = None

    def write(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, H, 1, D] at the present position of one layer; returns its keys and values [B, H, L, D].
        Lengths of all layers grow together, in `finish`."""
        layer: Any = self.cache.layers[layer_idx]
        layer.keys.index_copy_(2, self.position, k)
        layer.values.index_copy_(2, self.position, v)
        self._written.append(layer.cumulative_length)
        return layer.keys, layer.values

    def added(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask to be added to the scores, out of a bool one; made once for all layers."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self._added is None or self._added[0] is not mask:
            lowest = torch.finfo(dtype).min
            self._added = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        return self._added[1]

    def finish(self) -> None:
        """Count the new token in every layer that was written."""
        if self._written:
            torch._foreach_add_(self._written, 1)  # pyright: ignore[reportPrivateImportUsage]

    @property
    def first(self) -> Tensor:
        """int64 [B], the first position that each row sees."""
        if self._first is None:
            self._first = self.mask.argmax(1)
        return self._first

    @property
    def last(self) -> Tensor:
        """int64 [B], the present position."""
        return self.position.expand(self.mask.shape[0])


def is_static(cache: Any) -> bool:
    """Whether every layer of a cache is there in full and has no state outside its tensors."""
    return (
        type(cache) is StaticCache
        and not getattr(cache, "offloading", False)
        and all(type(layer) is StaticLayer and layer.is_initialized for layer in cache.layers)
    )


def static_step(
    forward: Callable[..., Any], cache: StaticCache, buffers: Buffers, shared: Any, options: dict[str, Any]
) -> Any:
    """One token of each row: reads `buffers`, writes `cache`, returns what `forward` does. `shared.step` is
    set meanwhile. Makes no value known to the host."""
    step = Step(cache, buffers.mask)
    with _during(step, shared):
        out = forward(
            input_ids=buffers.ids,
            attention_mask=buffers.mask,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
    step.finish()
    return out


@contextmanager
def _during(step: Step, shared: Any) -> Iterator[None]:
    """Fused blocks take bool masks; transformers makes those without copying a number from the host, which a
    CUDA graph forbids, where the config says sdpa."""
    config, name = shared.config, None if shared.config is None else shared.config._attn_implementation
    shared.step = step
    if name == "eager":
        config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        shared.step = None
        if name == "eager":
            config._attn_implementation = name
