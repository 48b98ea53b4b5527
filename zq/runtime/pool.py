"""Static caches that lie at the same addresses from call to call, so that captured graphs go on fitting."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

SHARE = 0.5  # of the free memory of a GPU, for keys and values that may never be used


def bucket(length: int) -> int:
    """The least of 128, 192, 256, 384, 512, 768, ... that is not below `length`: calls of nearly the same
    length share graphs, and no more than a third of a cache is in vain."""
    size = 128
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size


class CachePool:
    """Memory for keys and values, as much as the largest call so far has needed.

    It is lent to one cache at a time; while that one lives, others get None and make their own.
    """

    def __init__(self, config: Any) -> None:
        self.config = config.get_text_config(decoder=True)
        heads = getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        width = getattr(self.config, "head_dim", None)
        width = width or self.config.hidden_size // self.config.num_attention_heads
        self.shape = (int(heads), int(width))
        self.held: list[tuple[Tensor, Tensor, Tensor]] = []  # of each layer: keys, values (flat), length
        self.lent: Any = None  # a weak reference

    @torch.inference_mode(False)  # else tensors could not be written outside of it
    @torch.no_grad()
    def lease(self, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> StaticCache | None:
        """An empty static cache for `batch` rows of at least `length` positions, or None: for sliding
        windows, while the one before is in use, and where it would take much of the memory that is left."""
        if self.lent is not None and self.lent() is not None:
            return None
        cache = StaticCache(self.config, max_cache_len=bucket(length))
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            return None
        shape = (batch, self.shape[0], bucket(length), self.shape[1])
        if not self._reserve(len(cache.layers), torch.Size(shape).numel(), device, dtype):
            return None
        for (keys, values, count), layer in zip(self.held, cache.layers, strict=True):
            _place(layer, shape, keys, values, count)
        self.lent = weakref.ref(cache)
        return cache

    def _reserve(self, layers: int, size: int, device: torch.device, dtype: torch.dtype) -> bool:
        """Hold `size` values twice for each layer; False where that is too much."""
        if self.held:
            keys = self.held[0][0]
            if keys.numel() >= size and (keys.device, keys.dtype) == (device, dtype):
                return True
        self.held = []  # first, so that both are never there
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if 2 * layers * size * dtype.itemsize > SHARE * free:
                return False
        for _ in range(layers):
            keys, values = (torch.empty(size, dtype=dtype, device=device) for _ in range(2))
            self.held.append((keys, values, torch.zeros((), dtype=torch.int64, device=device)))
        return True


def _place(layer: Any, shape: tuple[int, ...], keys: Tensor, values: Tensor, count: Tensor) -> None:
    """Let a fresh StaticLayer lie in memory that is there, emptied."""
    nothing = keys.new_empty(0, shape[1], 0, shape[3])
    layer.lazy_initialization(nothing, nothing)
    size = torch.Size(shape).numel()
    layer.keys, layer.values = (flat[:size].view(shape).zero_() for flat in (keys, values))
    layer.cumulative_length, layer.batch_size = count.zero_(), shape[0]
