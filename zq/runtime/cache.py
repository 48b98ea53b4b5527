"""The cache of keys and values, in 16 bits or in INT8 / FP8 with a scale for each token of each head.

A static cache for transformers' generate() and for kernels: memory for all tokens at once, written in place.
What transformers' attention gets from a quantized layer is dequantized; `torch.ops.zq.store_kv` and
`decode_attention` work on its codes and scales (`keys`, `values`, `key_scale`, `value_scale`) themselves.
Keys are stored after the rotary embedding. Codes and scales are those of zq's token-wise activations: absmax
/ 127.5, absmax / 448.
"""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticCache, StaticLayer

import zq.kernels.ops  # noqa: F401 (defines torch.ops.zq)
from zq.errors import ZqError
from zq.kernels import reference
from zq.models.families import FAMILIES

CODES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
MULTIPLE = 16  # of the channels of a head: kernels read 16 bytes at a time


def quantize(x: Tensor, kv: str) -> tuple[Tensor, Tensor]:
    """x [B, H, T, D] -> codes of the same shape, scale [B, H, T] float32."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if rows.shape[1] % MULTIPLE or not _has_kernel(x.device, kv):
        codes, scale = reference.quantize(rows, CODES[kv])
    else:  # operators, which torch.compile leaves as they are
        codes, scale = torch.ops.zq.quant_int8(rows)[:2] if kv == "int8" else torch.ops.zq.quant_fp8(rows)
    return codes.view(x.shape), scale.view(x.shape[:3])


def _has_kernel(device: torch.device, kv: str) -> bool:
    return device.type != "cuda" or kv == "int8" or torch.cuda.get_device_capability(device) >= (8, 9)


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse; float32 products rounded to dtype."""
    return (codes.float() * scale[..., None]).to(dtype)


class QuantizedStaticLayer(StaticLayer):
    """A layer of `make_cache`: keys, values [B, H, L, D] int8 or e4m3; key_scale, value_scale [B, H, L]
    float32."""

    is_croppable = True

    def __init__(self, max_cache_len: int, kv: str) -> None:
        super().__init__(max_cache_len)
        self.kv = kv
        self.keys: Tensor
        self.values: Tensor
        self.key_scale: Tensor
        self.value_scale: Tensor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(
            key_states[:, :, :0].to(CODES[self.kv]), value_states[:, :, :0].to(CODES[self.kv])
        )
        self.dtype = key_states.dtype
        self.key_scale, self.value_scale = (
            torch.ones(x.shape[:3], device=x.device) for x in (self.keys, self.values)
        )
        if not torch.compiler.is_compiling():
            torch._dynamo.mark_static_address(self.key_scale)
            torch._dynamo.mark_static_address(self.value_scale)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that is stored; codes as bytes, since torch copies no FP8 by index."""
        raw = torch.uint8
        return self.keys.view(raw), self.values.view(raw), self.key_scale, self.value_scale

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Quantize any number of tokens into the next places; returns all L keys and values, dequantized."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[-2]
        place = torch.arange(count, device=self.device) + self.cumulative_length
        self.cumulative_length.add_(count)
        (k, k_scale), (v, v_scale) = quantize(key_states, self.kv), quantize(value_states, self.kv)
        fresh = (k.view(torch.uint8), v.view(torch.uint8), k_scale, v_scale)
        for kept, new in zip(self.tensors(), fresh, strict=True):
            kept.index_copy_(2, place, new)
        return (
            dequantize(self.keys, self.key_scale, self.dtype),
            dequantize(self.values, self.value_scale, self.dtype),
        )

    def reset(self) -> None:
        """Forget all tokens; memory stays where it is."""
        super().reset()
        if self.is_initialized:
            self.key_scale.fill_(1)
            self.value_scale.fill_(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        if self.is_initialized:
            for kept in self.tensors():
                kept.copy_(kept.index_select(0, beam_idx.to(kept.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens. Raises ZqError when it is positive."""
        if tokens_to_remove > 0:
            raise ZqError(
                f"a cache cannot be cropped to {tokens_to_remove} tokens; give the number of tokens to "
                "remove, negative"
            )
        self.cumulative_length.add_(tokens_to_remove).clamp_(min=0)


class RoundedLayer(DynamicLayer):
    """A growing layer in the dtype of the model whose keys and values are rounded as a quantized cache rounds
    them: for measuring, since attention runs as it does without a cache."""

    def __init__(self, kv: str) -> None:
        super().__init__()
        self.kv = kv

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, H, T, D] each -> all tokens so far."""
        return super().update(*(rounded(x, self.kv) for x in (key_states, value_states)), *args, **kwargs)


def rounded(x: Tensor, kv: str) -> Tensor:
    """x [B, H, T, D] quantized and dequantized."""
    return dequantize(*quantize(x, kv), x.dtype)


class KVCache(StaticCache):
    """What `make_cache` makes: `kv` is int8, fp8 or None (16 bits)."""

    def __init__(self, layers: list[StaticLayer], kv: str | None) -> None:
        Cache.__init__(self, layers=list(layers))  # StaticCache chooses layers itself
        self.kv = kv

    @property
    def nbytes(self) -> int:
        """Memory of keys, values and scales, in bytes."""
        names = ("keys", "values", "key_scale", "value_scale")
        found = [getattr(layer, name, None) for layer in self.layers for name in names]
        return sum(x.nbytes for x in found if x is not None)


def make_cache(
    config: Any,
    batch: int,
    length: int,
    dtype: torch.dtype,
    kv: str | None = None,
    device: torch.device | str = "cpu",
) -> KVCache:
    """Memory for `length` tokens of `batch` rows in a decoder of this transformers config.

    dtype: of the model, and of what is stored when kv is None. Layers with a sliding window keep all tokens,
    and attention masks those outside. Raises ZqError for an encoder, a kv that is not int8, fp8 or None,
    heads of a size that no kernel reads, and sizes below 1.
    """
    check_kv(kv, config)
    if batch < 1 or length < 1:
        raise ZqError(f"a cache of {batch} rows and {length} tokens holds nothing; give at least 1 of each")
    heads, channels = heads_of(config, kv)
    cache = KVCache(empty_layers(config, length, kv), kv)
    cache.early_initialization(batch, heads, channels, dtype, torch.device(device))
    return cache


def heads_of(config: Any, kv: str | None) -> tuple[int, int]:
    """(key-value heads, channels of each) of a decoder. Raises ZqError where no kernel reads them."""
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    channels = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if kv and channels % MULTIPLE:
        raise ZqError(
            f"heads have {channels} channels, and a quantized cache needs a multiple of {MULTIPLE}; use 16 "
            "bits"
        )
    return int(heads), int(channels)


def empty_layers(config: Any, length: int, kv: str | None) -> list[StaticLayer]:
    """A layer for each block, without memory yet."""
    count = config.get_text_config(decoder=True).num_hidden_layers
    return [QuantizedStaticLayer(length, kv) if kv else StaticLayer(length) for _ in range(count)]


def rounding_cache(config: Any, kv: str) -> Cache:
    """An empty cache of `RoundedLayer`s for one forward pass. Raises ZqError as `make_cache` does."""
    check_kv(kv, config)
    layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[RoundedLayer(kv) for _ in range(layers)])


def cache_name(parameters: Collection[str]) -> str:
    """What a forward with these parameters calls its cache, also in its output: `cache` since transformers
    5.24, `past_key_values` before."""
    return "cache" if "cache" in parameters else "past_key_values"


def cache_argument(model: Any) -> str:
    """What a model of transformers calls its cache."""
    return cache_name(signature(type(model).forward).parameters)


def check_kv(kv: str | None, config: Any) -> None:
    """Raises ZqError for a kind of cache that there is not, and for a model that has none."""
    if kv is not None and kv not in CODES:
        raise ZqError(f"a cache of {kv} is unknown; allowed: {', '.join(CODES)}, or none of them for 16 bits")
    family = FAMILIES.get(config.model_type)
    if family is not None and family.encoder:
        raise ZqError(
            f"a {config.model_type} model is an encoder and keeps no keys and values; use a decoder"
        )
