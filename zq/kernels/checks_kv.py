"""What the operators of attention take and give; see zq.kernels.checks. Raises ZqError."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels.checks import F32, FP8, HALVES, I32, INT8, MULTIPLE, Outputs, choice, quantized, tensor

CHANNELS = 256  # of a head, at most
ROPES = ("none", "half", "interleaved")
ALIGNED = 16  # bytes, of every row of a cache
TEXT_CHANNELS = 128  # of a head in a text, at most
TEXT_ROWS = 65535  # of a batch of texts, at most
TEXT_HEADS = 16  # of a text whose rows come out in codes, at most


def strides(op: str, name: str, x: Tensor) -> None:
    """Rows of x [., ., ., D] are read 16 bytes at a time."""
    if x.stride(3) != 1 or any(s * x.element_size() % ALIGNED for s in x.stride()[:3]):
        raise ZqError(
            f"zq::{op}: {name} has strides {list(x.stride())}; the last must be 1 and the others multiples "
            f"of {ALIGNED} bytes"
        )


def width(op: str, channels: int, most: int) -> None:
    """Of a head."""
    if channels % MULTIPLE or channels > most or channels == 0:
        raise ZqError(
            f"zq::{op}: heads have {channels} channels; allowed: multiples of {MULTIPLE} up to {most}"
        )


def cache(op: str, name: str, x: Tensor, shape: tuple[Any, ...], like: Tensor) -> None:
    """x [B, Hkv, L, D] is a cache of 16 bits (in the dtype of `like`) or of codes, of any strides but the
    last."""
    if x.dtype not in (like.dtype, INT8, FP8):
        allowed = ", ".join(str(each).removeprefix("torch.") for each in (like.dtype, INT8, FP8))
        raise ZqError(f"zq::{op}: {name} is {str(x.dtype).removeprefix('torch.')}; allowed: {allowed}")
    if tuple(x.shape) != shape:
        raise ZqError(f"zq::{op}: {name} has shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ZqError(f"zq::{op}: {name} is on {x.device}, the input on {like.device}; move one of them")
    strides(op, name, x)


def caches(
    op: str, k: Tensor, v: Tensor, scales: dict[str, Tensor | None], like: Tensor, shape: tuple[Any, ...]
) -> None:
    """Both caches are alike, and have scales [B, Hkv, L] exactly where they hold codes."""
    channels = shape[3]
    width(op, channels, CHANNELS)
    cache(op, "k", k, shape, like)
    cache(op, "v", v, shape, like)
    if v.dtype != k.dtype:
        kinds = [str(each.dtype).removeprefix("torch.") for each in (k, v)]
        raise ZqError(f"zq::{op}: k is {kinds[0]} and v is {kinds[1]}; give both in one type")
    for name, scale in scales.items():
        if (scale is None) != (k.dtype == like.dtype):
            what = (
                "is missing; give float32 scales" if scale is None else "is given, but k and v are no codes"
            )
            raise ZqError(f"zq::{op}: {name} {what}")
        if scale is None:
            continue
        if scale.dtype != F32 or tuple(scale.shape) != shape[:3] or scale.stride(2) != 1:
            raise ZqError(
                f"zq::{op}: {name} is {str(scale.dtype).removeprefix('torch.')} of shape "
                f"{list(scale.shape)}, expected float32 {list(shape[:3])} with positions side by side"
            )
        if scale.device != like.device:
            raise ZqError(
                f"zq::{op}: {name} is on {scale.device}, the input on {like.device}; move one of them"
            )


def heads_of(op: str, heads: Any, kv_heads: Any) -> None:
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise ZqError(
            f"zq::{op}: {heads} query heads cannot share {kv_heads} key-value heads; the first must be a "
            "multiple of the second"
        )


def decode_attention(  # noqa: PLR0913 (the operator's arguments)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    first: Tensor,
    last: Tensor,
    scale: float,
    slopes: Tensor | None,
) -> Outputs:
    op = "decode_attention"
    if q.dim() != 3 or k.dim() != 4:
        raise ZqError(
            f"zq::{op}: q has shape {list(q.shape)} and k {list(k.shape)}, expected [B, Hq, D] and "
            "[B, Hkv, L, D]"
        )
    rows, heads, channels = q.shape
    tensor(op, "q", q, HALVES, (rows, heads, channels), q)
    heads_of(op, heads, k.shape[1])
    caches(op, k, v, {"k_scale": k_scale, "v_scale": v_scale}, q, (rows, k.shape[1], k.shape[2], channels))
    tensor(op, "first", first, (I32,), (rows,), q)
    tensor(op, "last", last, (I32,), (rows,), q)
    if slopes is not None:
        tensor(op, "slopes", slopes, (F32,), (heads,), q)
    return [((rows, heads, channels), q.dtype)]


def attend_token(  # noqa: PLR0913
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    first: Tensor,
    last: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    rope: str,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    scale: float,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Outputs:
    op = "attend_token"
    for name, places in (("first", first), ("last", last)):
        tensor(op, name, places, (I32,), (qkv.shape[0],), qkv)
    given = (k, v, k_scale, v_scale, last, cos, sin, heads, kv_heads, rope, q_norm, k_norm, eps)
    (((rows, _, channels), _),) = store_kv(qkv, *given, op=op)
    if slopes is not None:
        tensor(op, "slopes", slopes, (F32,), (heads,), qkv)
    choice(op, "dtype", dtype, (INT8, FP8))
    return quantized(rows, heads * channels, dtype)


def store_kv(  # noqa: PLR0913
    qkv: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    position: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    kv_heads: int,
    rope: str,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
    tokens: int = 1,
    op: str = "store_kv",
) -> Outputs:
    if qkv.dim() != 2 or k.dim() != 4:
        raise ZqError(
            f"zq::{op}: qkv has shape {list(qkv.shape)} and k {list(k.shape)}, expected "
            "[B, (Hq + 2 Hkv) D] and [B, Hkv, L, D]"
        )
    rows, channels = qkv.shape[0], k.shape[3]
    if tokens < 1 or rows % tokens:
        raise ZqError(
            f"zq::{op}: {rows} rows are no multiple of tokens, which is {tokens}; give those of a row"
        )
    heads_of(op, heads, kv_heads)
    tensor(op, "qkv", qkv, HALVES, (rows, (heads + 2 * kv_heads) * channels), qkv)
    cached = (rows // tokens, kv_heads, k.shape[2], channels)
    caches(op, k, v, {"k_scale": k_scale, "v_scale": v_scale}, qkv, cached)
    tensor(op, "position", position, (torch.int32, torch.int64), (rows,), qkv)
    choice(op, "rope", rope, ROPES)
    if (rope == "none") != (cos is None) or (cos is None) != (sin is None):
        raise ZqError(
            f"zq::{op}: rope is {rope}; give cos and sin both with half and interleaved, else neither"
        )
    if cos is not None and sin is not None:
        rotary = cos.shape[-1]
        if rotary % 2 or rotary > channels or rotary == 0:
            raise ZqError(
                f"zq::{op}: cos rotates {rotary} of {channels} channels; give an even number of them"
            )
        tensor(op, "cos", cos, (qkv.dtype,), (rows, rotary), qkv)
        tensor(op, "sin", sin, (qkv.dtype,), (rows, rotary), qkv)
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            tensor(op, name, weight, (qkv.dtype,), (channels,), qkv)
    return [((rows, heads, channels), qkv.dtype)]


def _heads(op: str, name: str, x: Tensor, like: Tensor) -> None:
    """x [B, S, H, D], of any strides but the last."""
    if x.dtype != like.dtype or x.device != like.device:
        kinds = [f"{str(each.dtype).removeprefix('torch.')} on {each.device}" for each in (x, like)]
        raise ZqError(f"zq::{op}: {name} is {kinds[0]} and q is {kinds[1]}; give both in one type and place")
    if x.dim() != 4 or x.shape[:2] != like.shape[:2] or x.shape[3] != like.shape[3]:
        raise ZqError(
            f"zq::{op}: {name} has shape {list(x.shape)} and q {list(like.shape)}, expected [B, S, heads, D]"
        )
    strides(op, name, x)


def attend_text(  # noqa: PLR0913 (the operator's arguments)
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_to: Tensor | None,
    v_to: Tensor | None,
    causal: bool,
    scale: float,
    op: str = "attend_text",
) -> Outputs:
    if q.dtype not in HALVES:
        raise ZqError(f"zq::{op}: q is {str(q.dtype).removeprefix('torch.')}; allowed: bfloat16, float16")
    for name, x in (("q", q), ("k", k), ("v", v)):
        _heads(op, name, x, q)
    batch, tokens, heads, channels = q.shape
    width(op, channels, TEXT_CHANNELS)
    if batch > TEXT_ROWS:
        raise ZqError(f"zq::{op}: q has {batch} rows; allowed: up to {TEXT_ROWS}; give it some at a time")
    if not scale > 0:
        raise ZqError(f"zq::{op}: scale is {scale}; it must be more than 0")
    heads_of(op, heads, k.shape[2])
    if v.shape != k.shape:
        raise ZqError(f"zq::{op}: k has shape {list(k.shape)} and v {list(v.shape)}; they must be equal")
    if mask is not None:
        tensor(op, "mask", mask, (q.dtype,), (batch, tokens), q)
    if (k_to is None) != (v_to is None):
        raise ZqError(f"zq::{op}: {'k_to' if k_to is None else 'v_to'} is missing; give both or neither")
    for name, x in (("k_to", k_to), ("v_to", v_to)):
        if x is None:
            continue
        if x.dim() != 4 or x.shape[2] < tokens or x.dtype != q.dtype:
            raise ZqError(
                f"zq::{op}: {name} is {str(x.dtype).removeprefix('torch.')} of shape {list(x.shape)}, "
                f"expected {str(q.dtype).removeprefix('torch.')} [B, Hkv, L, D] with L >= {tokens}"
            )
        cache(op, name, x, (batch, k.shape[2], x.shape[2], channels), q)
    return [((batch * tokens, heads * channels), q.dtype)]


def attend_text_codes(  # noqa: PLR0913
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_to: Tensor | None,
    v_to: Tensor | None,
    causal: bool,
    scale: float,
    dtype: torch.dtype,
) -> Outputs:
    op = "attend_text_codes"
    (((rows, channels), _),) = attend_text(q, k, v, mask, k_to, v_to, causal, scale, op)
    choice(op, "dtype", dtype, (INT8, FP8))
    if q.shape[2] > TEXT_HEADS:
        raise ZqError(
            f"zq::{op}: q has {q.shape[2]} heads; allowed: up to {TEXT_HEADS}; use attend_text and quantize "
            "its rows"
        )
    return quantized(rows, channels, dtype)
