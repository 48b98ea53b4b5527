"""Static caches that lie at the same addresses from call to call, so that captured graphs go on fitting."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

ROUND = 128  # positions: calls of nearly the same length share a cache


class CachePool:
    """One set of keys and values for the largest batch and length so far; smaller batches see a part of it.

    It is lent to one cache at a time; while that one lives, others get None and make their own.
    """

    def __init__(self, config: Any) -> None:
        self.config = config.get_text_config(decoder=True)
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None)
        width = width or self.config.hidden_size // self.config.num_attention_heads
        self.shape = (int(heads), int(width))
        self.batch = self.length = 0
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []  # keys, values, length of each layer
        self.lent: Any = None  # a weak reference

    @torch.inference_mode(False)  # else tensors could not be written outside of it
    @torch.no_grad()
    def lease(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> StaticCache | None:
        """An empty static cache for `batch` rows of at least `length` positions, or None: for sliding
        windows, and while the one before is in use."""
        if self.lent is not None and self.lent() is not None:
            return None
        if self.held and (self.held[0][0].device, self.held[0][0].dtype) != (device, dtype):
            self.batch = self.length = 0
        if batch > self.batch or length > self.length:
            self.batch = max(batch, self.batch)
            self.length = -(-max(length, self.length) // ROUND) * ROUND
            self.held = []  # first, so that both are never there
        cache = StaticCache(self.config, max_cache_len=self.length)
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            return None
        self._fill(cache, batch, device, dtype)
        self.lent = weakref.ref(cache)
        return cache

    def _fill(self, cache: StaticCache, batch: int, device: torch.device, dtype: torch.dtype) -> None:
        heads, width = self.shape
        fresh = not self.held
        for i, layer in enumerate(cache.layers):
            states = torch.empty(self.batch if fresh else 0, heads, 0, width, device=device, dtype=dtype)
            held: Any = layer
            held.lazy_initialization(states, states)
            if fresh:
                self.held.append((held.keys, held.values, held.cumulative_length))
            keys, values, count = self.held[i]
            held.keys, held.values = keys[:batch].zero_(), values[:batch].zero_()
            held.cumulative_length, held.batch_size = count.zero_(), batch
