"""A text that a decoder reads without a cache. Keys and values lie in memory of zq's own meanwhile, so that
it can be captured and replayed as a prompt (graphs.py), and leave in a dynamic cache if one is wanted."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from zq.runtime.cache import KVCache, empty_layers, heads_of
from zq.runtime.pool import bucket, place
from zq.runtime.prompt import PromptBuffers


class TextBuffers(PromptBuffers):
    """What a text reads and writes: what a prompt does; `both` [2 layers, B, H, S, D], keys and values of
    each layer in turn, and `cache`, a static one that lies there."""

    def __init__(self, config: Any, prompt: PromptBuffers, both: Tensor) -> None:
        super().__init__(prompt.ids, prompt.positions, prompt.mask)
        self.both = both
        self.cache = KVCache(empty_layers(config, both.shape[3], None), None)
        self.lengths = torch.zeros(len(self.cache.layers), dtype=torch.int64, device=both.device)
        for i, layer in enumerate(self.cache.layers):
            place(layer, tuple(both.shape[1:]), both.dtype, self.lengths[i], both[2 * i], both[2 * i + 1])

    def fill(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> None:
        super().fill(ids, positions, mask)
        self.lengths.zero_()


class TextMemory:
    """Memory for keys and values, about as much as the largest text that may be captured has needed. They are
    copied out of it, so all texts share it."""

    def __init__(self, config: Any) -> None:
        self.config = config.get_text_config(decoder=True)
        self.flat: Tensor | None = None

    @cached_property
    def grows(self) -> bool:
        """Whether the cache that a model would make itself keeps all positions of every layer."""
        layers = DynamicCache(config=self.config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    def shape(self, batch: int, count: int) -> torch.Size:
        """Of keys and values of all layers [2 layers, B, H, S, D]."""
        heads, channels = heads_of(self.config, None)
        return torch.Size((2 * self.config.num_hidden_layers, batch, heads, count, channels))

    def holds(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> bool:
        flat = self.flat
        if flat is None or flat.numel() < shape.numel():
            return False
        return (flat.dtype, flat.device) == (dtype, device)

    @torch.inference_mode(False)  # else they could not be written outside of it
    def make(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
        """Hold `shape`, and a little more, so that a text that grows by a token at a time does not move it
        every time. Nothing may lie there any more."""
        self.flat = None  # first, so that both are never there
        self.flat = torch.empty(bucket(shape.numel()), dtype=dtype, device=device)

    def view(self, shape: torch.Size) -> Tensor:
        assert self.flat is not None
        return self.flat[: shape.numel()].view(shape)


def dynamic_cache(config: Any, both: Tensor) -> DynamicCache:
    """A cache of these keys and values [2 layers, B, H, S, D], which are not copied."""
    cache = DynamicCache(config=config)
    layers: Any = cache.layers
    if not layers:  # a config that says nothing of them
        layers.extend(DynamicLayer() for _ in range(len(both) // 2))
    for i, layer in enumerate(layers):
        layer.dtype, layer.device = both.dtype, both.device
        layer.keys, layer.values = both[2 * i], both[2 * i + 1]
        layer.is_initialized = True
    return cache
