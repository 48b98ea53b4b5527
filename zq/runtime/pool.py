"""Static caches that lie at the same addresses from call to call, so that captured graphs go on fitting."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer

from zq.runtime.cache import CODES, KVCache, empty_layers, heads_of

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
        self.held: list[tuple[Tensor, ...]] = []  # of each layer: length, keys, values, scales (flat)
        self.lent: Any = None  # a weak reference
        self.written: Any = None  # an event behind what the last call may still be writing, or None

    @property
    def nbytes(self) -> int:
        """Memory of keys, values and scales, in bytes."""
        return sum(x.nbytes for _, *stored in self.held for x in stored)

    def settle(self, device: torch.device) -> None:
        """What follows on the current stream of a device comes behind what the last call has left."""
        if self.written is not None:
            torch.cuda.current_stream(device).wait_event(self.written)
            self.written = None

    @torch.inference_mode(False)  # else tensors could not be written outside of it
    @torch.no_grad()
    def lease(
        self, batch: int, length: int, device: torch.device, dtype: torch.dtype, kv: str | None = None
    ) -> StaticCache | None:
        """An empty static cache for `batch` rows of at least `length` positions, or None: for sliding
        windows, while the one before is in use, and where it would take much of the memory that is left.

        dtype: of the model. kv: int8 or fp8, for codes and scales (zq/runtime/cache.py)."""
        if self.lent is not None and self.lent() is not None:
            return None
        self.settle(device)
        size = bucket(length)
        cache = StaticCache(self.config, max_cache_len=size)
        if not all(type(layer) is StaticLayer for layer in cache.layers):
            return None
        if kv is not None:
            cache = KVCache(empty_layers(self.config, size, kv), kv)
        heads, channels = heads_of(self.config, kv)
        shape = (batch, heads, size, channels)
        if not self._reserve(len(cache.layers), shape, device, dtype if kv is None else CODES[kv], dtype):
            return None
        for held, layer in zip(self.held, cache.layers, strict=True):
            place(layer, shape, dtype, *held)
            layer.reset()
        self.lent = weakref.ref(cache)
        return cache

    def _reserve(
        self,
        layers: int,
        shape: tuple[int, ...],
        device: torch.device,
        stored: torch.dtype,
        dtype: torch.dtype,
    ) -> bool:
        """Hold values of `shape` twice for each layer; False where that is too much."""
        size = torch.Size(shape).numel()
        scales = 0 if stored == dtype else size // shape[-1]
        if self.held:
            keys = self.held[0][1]
            if keys.numel() >= size and (keys.device, keys.dtype) == (device, stored):
                return True
        self.held = []  # first, so that both are never there
        if device.type == "cuda":
            free = torch.cuda.mem_get_info(device)[0]
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            if 2 * layers * (size * stored.itemsize + 4 * scales) > SHARE * free:
                return False
        for _ in range(layers):
            count = torch.zeros((), dtype=torch.int64, device=device)
            made = [torch.empty(size, dtype=stored, device=device) for _ in range(2)]
            made += [torch.empty(scales, device=device) for _ in range(2 if scales else 0)]
            self.held.append((count, *made))
        return True


def place(layer: Any, shape: tuple[int, ...], dtype: torch.dtype, count: Tensor, *stored: Tensor) -> None:
    """Let a fresh layer of a static cache lie in memory that is there."""
    nothing = torch.empty(0, shape[1], 0, shape[3], dtype=dtype, device=count.device)
    layer.lazy_initialization(nothing, nothing)
    for name, flat in zip(("keys", "values", "key_scale", "value_scale"), stored, strict=False):
        whole = shape[:3] if "scale" in name else shape
        setattr(layer, name, flat.view(-1)[: torch.Size(whole).numel()].view(whole))
    layer.cumulative_length, layer.batch_size = count, shape[0]
