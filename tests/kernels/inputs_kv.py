"""Arguments for the operators of attention. What a row must not read is NaN (codes: the largest)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.inputs import BF16, FP8, normal
from zq.kernels import reference

KINDS = {None: None, "int8": torch.int8, "fp8": FP8}


def cache(
    shape: tuple[int, int, int, int], kv: str | None, dtype: torch.dtype, seed: int, size: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Random keys or values [B, Hkv, L, D], their scales [B, Hkv, L]; sizes of tokens vary."""
    x = normal(*shape, seed=seed) * torch.exp(0.5 * normal(*shape[:3], 1, seed=seed + 1)) * size
    if kv is None:
        return x.to(dtype), None
    codes, scale = reference.quantize(x.to(dtype).reshape(-1, shape[3]), KINDS[kv])
    return codes.view(shape), scale.view(shape[:3])


def view_of(x: Tensor, fill: Any) -> Tensor:
    """The same values inside larger memory full of `fill`: other strides, as a cache of more heads has."""
    b, h, length, d = x.shape
    raw = x.view(torch.uint8) if x.element_size() == 1 else x.view(torch.int16)
    around = torch.full((b, length + 3, h + 1, d), fill, dtype=raw.dtype)
    place = around[:, 2 : length + 2, :h].transpose(1, 2)
    place.copy_(raw)
    return place.view(x.dtype)


def attention_args(
    shape: tuple[int, int, int, int, int],
    kv: str | None = None,
    dtype: torch.dtype = BF16,
    spans: Sequence[tuple[int, int]] | None = None,
    alibi: bool = False,
    seed: int = 0,
    size: float = 1.0,
) -> tuple[Any, ...]:
    """shape: rows, query heads, key-value heads, positions, channels; spans: first and last of each row."""
    rows, heads, kv_heads, length, d = shape
    spans = spans or [(row % 3, length - 1 - row % 2) for row in range(rows)]
    first, last = (torch.tensor(each, dtype=torch.int32) for each in zip(*spans, strict=True))
    q = normal(rows, heads, d, seed=seed, dtype=dtype) * size
    (k, ks), (v, vs) = (
        cache((rows, kv_heads, length, d), kv, dtype, seed + s, z) for s, z in ((1, size), (3, 1))
    )
    for row, (begin, end) in enumerate(spans):
        for unseen in (slice(0, max(begin, 0)), slice(end + 1, None)):
            for x, scale in ((k, ks), (v, vs)):
                x[row, :, unseen] = torch.nan if kv != "int8" else 127
                if scale is not None:
                    scale[row, :, unseen] = torch.nan
    fill = 0x7F if kv else 0x7FFF
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads) if alibi else None
    return q, view_of(k, fill), view_of(v, fill), ks, vs, first, last, d**-0.5, slopes


def store_args(
    shape: tuple[int, int, int, int, int],
    kv: str | None = None,
    dtype: torch.dtype = BF16,
    rope: str = "half",
    rotary: int | None = None,
    norms: bool = False,
    wide: bool = True,
    seed: int = 0,
    tokens: int = 1,
) -> tuple[Any, ...]:
    """shape as above; the caches are full of other values before. The third row is zeros, if there is one.
    tokens: of each row, one behind the other."""
    batch, heads, kv_heads, length, d = shape
    rows = batch * tokens
    qkv = normal(rows, (heads + 2 * kv_heads) * d, seed=seed) * torch.logspace(-2, 2, rows)[:, None]
    qkv[2:3] = 0
    (k, ks), (v, vs) = (cache((batch, kv_heads, length, d), kv, dtype, seed + s) for s in (1, 3))
    position = torch.arange(rows) * 7 % length if tokens == 1 else torch.arange(tokens).repeat(batch)
    cos = sin = None
    if rope != "none":
        angle = torch.arange(rows)[:, None] * torch.linspace(1, 0.01, (rotary or d) // 2)
        angle = torch.cat((angle, angle), -1) if rope == "half" else angle.repeat_interleave(2, -1)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    weights = [1 + 0.2 * normal(d, seed=seed + s, dtype=dtype) if norms else None for s in (5, 6)]
    position = position if wide else position.int()
    fill = 0x7F if kv else 0x7FFF
    return (
        qkv.to(dtype),
        view_of(k, fill),
        view_of(v, fill),
        ks,
        vs,
        position,
        cos,
        sin,
        heads,
        kv_heads,
        rope,
        *weights,
        1e-6,
        *[tokens] * (tokens > 1),
    )


def token_args(
    shape: tuple[int, int, int, int, int],
    kv: str | None = None,
    dtype: torch.dtype = BF16,
    to: torch.dtype = torch.int8,
    spans: Sequence[tuple[int, int]] | None = None,
    alibi: bool = False,
    **options: Any,
) -> tuple[Any, ...]:
    """As `store_args`, which takes `options`; spans: first and last of each row. What lies behind the last
    is NaN, and so is the place of the new token."""
    rows, heads, _, length, d = shape
    qkv, k, v, ks, vs, _, cos, sin, *numbers, eps = store_args(shape, kv, dtype, wide=False, **options)
    spans = spans or [(row % 3, length - 1 - row % 2) for row in range(rows)]
    for row, (_, end) in enumerate(spans):
        for x, scale in ((k, ks), (v, vs)):
            x[row, :, max(end, 0) :] = torch.nan if kv != "int8" else 127
            if scale is not None:
                scale[row, :, max(end, 0) :] = torch.nan
    first, last = (torch.tensor(each, dtype=torch.int32) for each in zip(*spans, strict=True))
    slopes = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads) if alibi else None
    return qkv, k, v, ks, vs, first, last, cos, sin, *numbers, eps, d**-0.5, slopes, to


def in_parts(args: tuple[Any, ...], store: Any, attend: Any) -> tuple[Tensor, ...]:
    """attend_token by the other operators, `store` and `attend`, and the reference's rounding."""
    qkv, k, v, ks, vs, first, last, cos, sin, *numbers, eps, scale, slopes, to = args
    q = store(qkv, k, v, ks, vs, last, cos, sin, *numbers, eps)
    out = attend(q, k, v, ks, vs, first, last, scale, slopes)
    return reference.codes(out.view(out.shape[0], -1), to)


def text_args(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = BF16,
    causal: bool = True,
    masked: bool = False,
    kept: bool = False,
    seed: int = 0,
    size: float = 1.0,
) -> tuple[Any, ...]:
    """Of attend_text. shape: rows of the batch, query heads, key-value heads, tokens, channels. q, k and v
    are parts of one matrix. masked: tokens on the left, in the middle and on the right are hidden from the
    others, in the second row all; kept: caches, full of NaN, take k and v."""
    batch, heads, kv_heads, tokens, d = shape
    qkv = normal(batch, tokens, heads + 2 * kv_heads, d, seed=seed) * size
    qkv *= torch.exp(0.5 * normal(batch, tokens, 1, 1, seed=seed + 1))
    q, k, v = qkv.to(dtype).split((heads, kv_heads, kv_heads), 2)
    mask = None
    if masked:
        hidden = torch.zeros(batch, tokens, dtype=torch.bool)
        hidden[0::3, : tokens // 3] = hidden[1:2] = hidden[2::3, -(tokens // 4) :] = True
        hidden[0::2, tokens // 2] = True
        mask = torch.zeros(batch, tokens, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    to = [None, None]
    if kept:
        to = [view_of(torch.full((batch, kv_heads, tokens + 5, d), torch.nan, dtype=dtype), 0) for _ in "kv"]
    return q, k, v, mask, *to, causal, d**-0.5
