"""A prompt over an empty static cache: its tokens attend to each other only, however long the cache is, and
are left in it. Nothing is read on the host, so it can be captured and replayed (graphs.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from zq.runtime.step import during


class PromptBuffers:
    """What a prompt reads: ids, positions int64 [B, S]; mask int64 [B, S], None where every token is one."""

    def __init__(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        self.ids, self.positions, self.mask = ids, positions, mask

    @classmethod
    def like(cls, ids: Tensor, positions: Tensor, mask: Tensor | None) -> PromptBuffers:
        """Memory of their own."""
        own = None if mask is None else torch.empty(ids.shape, dtype=torch.int64, device=ids.device)
        return cls(torch.empty_like(ids), torch.empty_like(positions), own)

    def fill(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        self.ids.copy_(ids)
        self.positions.copy_(positions)
        if self.mask is not None and mask is not None:
            self.mask.copy_(mask)


class Prompt:
    """The prompt that is being read, for the blocks that know of it: what Step is to a decode step.

    addend: what the block before has left to be added to its output [M, K], so that the next norm does it.
    places: int64 [B * S], where each token lies in the cache.
    """

    own = False

    def __init__(self, cache: StaticCache, buffers: PromptBuffers) -> None:
        self.cache, self.mask = cache, buffers.mask
        self.addend: Tensor | None = None
        batch, count = buffers.ids.shape
        self.places = torch.arange(count, device=buffers.ids.device).repeat(batch)
        self._written: list[Tensor] = []
        self._added: Tensor | None = None
        self._hidden: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def layer(self, layer_idx: int) -> Any:
        """One layer of the cache, whose first places are written now."""
        layer: Any = self.cache.layers[layer_idx]
        self._written.append(layer.cumulative_length)
        return layer

    def write(self, layer_idx: int, k: Tensor, v: Tensor) -> None:
        """k, v [B, H, S, D] into the first places of one layer."""
        layer = self.layer(layer_idx)
        layer.keys[:, :, : k.shape[2]].copy_(k)
        layer.values[:, :, : v.shape[2]].copy_(v)

    def angles(self, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B * S, R] of tables [B or 1, S, R], which all layers have in common."""
        if self._angles is None:
            batch = len(self.places) // tables[0].shape[1]
            cos, sin = (x.expand(batch, -1, -1).flatten(0, 1).contiguous() for x in tables)
            self._angles = cos, sin
        return self._angles

    def added(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores [B, 1, S, S]; None: the causal mask and no other, as attention
        functions make it. Made once for all layers."""
        if self.mask is not None and self._added is None:
            count = self.mask.shape[1]
            seen = torch.ones(count, count, dtype=torch.bool, device=self.mask.device).tril()
            seen = seen & self.mask.ne(0)[:, None, None, :]
            lowest = torch.finfo(dtype).min
            self._added = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)
        return self._added

    def hidden(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of each token [B, S] beside the causal mask; None: nothing. Made once
        for all layers."""
        if self.mask is not None and self._hidden is None:
            added = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            self._hidden = added.masked_fill_(self.mask.eq(0), torch.finfo(dtype).min)
        return self._hidden

    def finish(self, count: int) -> None:
        """Count the tokens in every layer that was written."""
        if self._written:
            torch._foreach_add_(self._written, count)  # pyright: ignore[reportPrivateImportUsage]


def is_fresh(cache: Any, mask: Tensor | None) -> tuple[bool, bool]:
    """(whether a static cache is empty, whether a mask is all ones). Asks the device."""
    empty = cache.layers[0].cumulative_length == 0
    whole = torch.ones_like(empty) if mask is None else mask.all()
    found = torch.stack((empty.reshape(()), whole.reshape(()))).tolist()
    return found[0], found[1]


def prompt_step(
    forward: Callable[..., Any],
    cache: StaticCache,
    buffers: PromptBuffers,
    shared: Any,
    options: dict[str, Any],
) -> Any:
    """Reads `buffers`, writes the empty `cache`, returns what `forward` does. `shared.step` is set
    meanwhile."""
    step = Prompt(cache, buffers)
    with during(step, shared):
        out = forward(
            input_ids=buffers.ids,
            # transformers passes one of four dimensions on, and fused blocks take an empty one for none
            attention_mask=buffers.ids.new_empty((0, 1, 1, 1)),
            position_ids=buffers.positions,
            use_cache=True,
            return_dict=True,
            **options,
        )
    step.finish(buffers.ids.shape[1])
    return out
