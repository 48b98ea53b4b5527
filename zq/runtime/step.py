"""A decode step over static buffers: one new token in each row, a static cache, nothing that is read on the
host. It can be run as it is, or captured and replayed (graphs.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from zq.runtime.cache import KVCache, QuantizedStaticLayer


class Buffers:
    """What a step reads.

    ids, positions  int64 [B, 1]
    own             whether attention is zq's own; else it is torch's
    mask            int64 [B, L] for torch's: 1 where a position of the cache may be seen, if it lies before
                    the present; own: 4-d and empty, which transformers passes on as it is
    first, last     int32 [B], own: the first position that a row sees; the present one, written by the step
    turns           [2, P, R], own: cosine and sine of every position; None: made in the step, or not needed
    slopes          [H] float32, own: of ALiBi; or None
    """

    def __init__(self, batch: int, length: int, device: torch.device, own: bool) -> None:
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.ids)
        self.own = own
        self.mask = torch.ones((0, 1, 1, 1) if own else (batch, length), dtype=torch.int64, device=device)
        self.first = torch.zeros(batch, dtype=torch.int32, device=device)
        self.last = torch.zeros_like(self.first)
        self.turns: Tensor | None = None
        self.slopes: Tensor | None = None
        self._given: Tensor | None = None

    def fill(
        self, ids: Tensor, positions: Tensor | None, mask: Tensor | None, first: Tensor | None = None
    ) -> None:
        """ids [B, 1]; positions [B or 1, 1], None where the model takes none; mask [B, <= L], None: all;
        first int32 [B], own only. What was given the last time is not copied again."""
        self.ids.copy_(ids)
        if positions is not None:
            self.positions.copy_(positions)
        if self.own:
            if first is not None and first is not self._given:
                self.first.copy_(first)
                self._given = first
        elif mask is None:
            self.mask.fill_(1)
        else:
            self.mask[:, : mask.shape[1]].copy_(mask)
            self.mask[:, mask.shape[1] :].zero_()


class Step:
    """The step that is being made, for the blocks that know of it.

    addend: what the block before has left to be added to its output [M, K], so that the next norm does it.
    """

    def __init__(self, cache: StaticCache, buffers: Buffers) -> None:
        self.cache, self.buffers, self.own = cache, buffers, buffers.own
        self.addend: Tensor | None = None
        length: Any = cache.layers[0].cumulative_length  # type: ignore[union-attr]
        if self.own:
            buffers.last.copy_(length)
        else:
            self.position: Tensor = length.reshape(1).clone()
        self._written: list[Tensor] = []
        self._added: tuple[Tensor, Tensor] | None = None
        self._turn: Tensor | None = None

    def layer(self, layer_idx: int) -> Any:
        """One layer of the cache, into which a token is written now. Lengths of all layers grow together, in
        `finish`."""
        layer: Any = self.cache.layers[layer_idx]
        self._written.append(layer.cumulative_length)
        return layer

    def write(self, layer_idx: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, H, 1, D] at the present position of one layer; its keys and values [B, H, L, D]."""
        layer = self.layer(layer_idx)
        layer.keys.index_copy_(2, self.position, k)
        layer.values.index_copy_(2, self.position, v)
        return layer.keys, layer.values

    def added(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """A mask to be added to the scores, out of a bool one; made once for all layers."""
        if mask is None or mask.dtype != torch.bool:
            return mask
        if self._added is None or self._added[0] is not mask:
            lowest = torch.finfo(dtype).min
            self._added = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, lowest)
        return self._added[1]

    def turn(self) -> Tensor | None:
        """Cosine and sine [2, B, R] of the present positions, from the table; None where there is none."""
        if self._turn is None and self.buffers.turns is not None:
            self._turn = self.buffers.turns.index_select(1, self.buffers.positions.view(-1))
        return self._turn

    def finish(self) -> None:
        """Count the new token in every layer that was written."""
        if self._written:
            torch._foreach_add_(self._written, 1)  # pyright: ignore[reportPrivateImportUsage]


def is_static(cache: Any) -> bool:
    """Whether every layer of a cache is there in full and has no state outside its tensors."""
    return (
        type(cache) in (StaticCache, KVCache)
        and not getattr(cache, "offloading", False)
        and all(is_plain(layer) and layer.is_initialized for layer in cache.layers)
    )


def is_plain(layer: Any) -> bool:
    """Whether a layer of a cache keeps all positions in place."""
    return type(layer) in (StaticLayer, QuantizedStaticLayer)


def given_dtype(layer: Any) -> torch.dtype:
    """Of the keys that a static layer is given; it may store codes."""
    return layer.dtype if isinstance(layer, QuantizedStaticLayer) else layer.keys.dtype


def first_seen(cache: Any, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """The first position that each row of the next step sees, int32 [B], when its mask is one run of ones up
    to the present position, and no position lies behind that; else None. Asks the device.

    mask [B, K] or None: all; positions [B or 1, 1] or None.
    """
    layer = cache.layers[0]
    batch, length = layer.keys.shape[0], layer.keys.shape[2]
    last = layer.cumulative_length
    good = last < length
    if positions is not None:
        good = good & (positions <= last).all()
    if mask is None:
        first = torch.zeros(batch, dtype=torch.int64, device=last.device)
    else:
        seen = mask.ne(0) & (torch.arange(mask.shape[1], device=mask.device) <= last)
        first = seen.int().argmax(1)
        good = good & (seen.sum(1) == last + 1 - first).all()
    return first.int() if bool(good) else None


def static_step(
    forward: Callable[..., Any], cache: StaticCache, buffers: Buffers, shared: Any, options: dict[str, Any]
) -> Any:
    """One token of each row: reads `buffers`, writes `cache`, returns what `forward` does. `shared.step` is
    set meanwhile. Makes no value known to the host."""
    step = Step(cache, buffers)
    with during(step, shared):
        out = forward(
            input_ids=buffers.ids,
            attention_mask=buffers.mask,
            use_cache=True,
            return_dict=True,
            **options,
        )
    step.finish()
    return out


@contextmanager
def during(step: Any, shared: Any) -> Iterator[None]:
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
