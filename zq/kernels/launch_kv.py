"""Launches of the operators of attention: which kernel, how many blocks, which arguments."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.kernels import cuda
from zq.kernels.call import Launch, Scratch
from zq.kernels.checks_kv import TEXT_HEADS
from zq.kernels.table_kv import CLUSTERS, HEADS, PROMPTS, STORES, TEXTS, kv_units, text_unit

KINDS = {torch.bfloat16: "bf16", torch.float16: "fp16"}
CODES = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
THREADS, WARPS, QUERIES = 128, 4, 8
ROWS = 64  # queries of a head that a block of text.cu makes
TOGETHER = 8  # blocks of a cluster, at most
RESIDENT = 2  # blocks of attention.cu that a multiprocessor holds
FILL = (
    16  # blocks of store_kv.cu for each multiprocessor: where rows alone are as many, a block makes all heads
)
ROUNDS = 4  # of resident blocks, at most; where there are more chunks, a block takes several of them
STRIDES = ("k_batch", "k_head", "k_position", "v_batch", "v_head", "v_position")
SCALE_STRIDES = ("ks_batch", "ks_head", "vs_batch", "vs_head")


def _fields(pointers: str, integers: str, floats: str = "") -> list[tuple[str, Any]]:
    parts = ((pointers, ctypes.c_void_p), (integers, ctypes.c_int), (floats, ctypes.c_float))
    return [(name, kind) for names, kind in parts for name in names.split()]


def _structure(*parts: list[tuple[str, Any]]) -> Any:
    return type("Arguments", (ctypes.Structure,), {"_fields_": [field for part in parts for field in part]})


# `Cache` of cache.cuh, `Fused` of head.cuh, which begins with it, and `Args` of attention.cu, store_kv.cu
# and token.cu
_CACHE = _fields("k v k_scale v_scale", "")
_CACHE += [(name, ctypes.c_uint64) for name in (*STRIDES, *SCALE_STRIDES)]
_CACHE += _fields("", "heads kv_heads length d")
_FUSED = [*_CACHE, *_fields("qkv cos sin q_norm k_norm", "rotary interleaved tokens", "eps")]
AttentionArguments = _structure(
    _CACHE, _fields("q first last slopes out counters partial sums", "most pieces", "scale")
)
StoreArguments = _structure(_FUSED, _fields("position q", "wide"))
TokenArguments = _structure(
    _FUSED,
    _fields(
        "first last slopes out codes steps rowsum counters ended partial sums", "most pieces fp8", "scale"
    ),
)
PLACES = tuple(f"{x}_{of}" for x in ("q", "k", "v", "k_to", "v_to") for of in ("batch", "token", "head"))
TextArguments = _structure(
    _fields("q k v mask k_to v_to out steps rowsum", ""),
    [(name, ctypes.c_uint64) for name in PLACES],
    _fields("", "heads kv_heads tokens d causal per", "scale"),
    _fields("", "unused"),
)


def _cache(
    arguments: Any, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> str | None:
    """Fill in what all kernels want to know of the cache; returns its kind."""
    for name, stride in zip(STRIDES, (*k.stride()[:3], *v.stride()[:3]), strict=True):
        setattr(arguments, name, stride * k.element_size())
    if k_scale is not None and v_scale is not None:
        for name, stride in zip(SCALE_STRIDES, (*k_scale.stride()[:2], *v_scale.stride()[:2]), strict=True):
            setattr(arguments, name, stride)
    arguments.kv_heads, arguments.length, arguments.d = k.shape[1:]
    return CODES.get(k.dtype)


def most_chunks(length: int, pieces: int) -> int:
    """Chunks that a row of up to `length` positions can have: attend.cuh makes them of 128 positions at
    least, of 256 from 1024 positions on, and so long that there are not more than `pieces`."""
    short = min(-(-min(length, 1023) // 128), pieces)
    return max(short, min(-(-length // 256), pieces) if length >= 1024 else 1)


def attention_grid(rows: int, groups: int, length: int, sms: int) -> tuple[int, int, int]:
    """(pieces, most chunks of a row, blocks that share them). groups: key-value heads, times the tiles of
    eight query heads that each has. Only the last depends on the rows, and no result depends on it."""
    pieces = max(1, RESIDENT * sms // groups)
    most = most_chunks(length, pieces)
    slots = RESIDENT * sms
    whole = rows * groups * most <= ROUNDS * slots
    return pieces, most, most if whole else max(1, ROUNDS // 2 * slots // (rows * groups))


def decode_attention(  # noqa: PLR0913 (the operator's arguments)
    op: str,
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    first: Tensor,
    last: Tensor,
    scale: float,
    slopes: Tensor | None,
) -> Launch | None:
    rows, heads = q.shape[:2]
    if rows == 0:
        return None
    arguments = AttentionArguments(heads=heads, scale=scale)
    unit = kv_units(KINDS[q.dtype], _cache(arguments, k, v, k_scale, v_scale))[0]
    return _attention(unit, "attention", arguments, rows, q)


def _attention(
    unit: str, entry: str, arguments: Any, rows: int, like: Tensor, zeroed: int = 0, beside: int = 0
) -> Launch:
    """A launch over a cache that `_cache` has described. In its workspace lie `zeroed` bytes for `ended`,
    which are zero before and after, and `beside` bytes for `out`."""
    heads, kv_heads, d = arguments.heads, arguments.kv_heads, arguments.d
    device = cuda.describe(like.device.index)
    groups = kv_heads * -(-heads // kv_heads // QUERIES)
    pieces, most, blocks = attention_grid(rows, groups, arguments.length, device.sms)
    arguments.pieces, arguments.most = pieces, most
    chunks = rows * heads * most * (most > 1)
    parts = {"counters": rows * groups * 4 * (most > 1), "ended": zeroed, "out": beside}
    parts |= {"sums": chunks * 8, "partial": chunks * d * 4}
    fields, size = {}, 0
    for name, length in parts.items():
        if length:
            fields[name] = size
            size += -(-length // 256) * 256
    zeros = min((fields[name] for name in ("out", "sums") if name in fields), default=0)
    scratch = Scratch(size, zeros, fields) if size else None
    entry = f"{entry}_{min(size for size in HEADS if size >= d)}"
    return Launch(device, unit, entry, (groups, rows, blocks), THREADS, arguments, pdl=True, scratch=scratch)


def store_kv(  # noqa: PLR0913
    op: str,
    outputs: list[Tensor],
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
) -> Launch | None:
    rows = qkv.shape[0]
    if rows == 0:
        return None
    arguments = StoreArguments(heads=heads, eps=eps, tokens=tokens)
    kind = _cache(arguments, k, v, k_scale, v_scale)
    _turns(arguments, cos, rope)
    arguments.wide = position.dtype == torch.int64
    unit = kv_units(KINDS[qkv.dtype], kind)[1]
    device = cuda.describe(qkv.device.index)
    plain = kind is None and q_norm is None and k_norm is None
    if tokens > 1 and plain and arguments.d <= PROMPTS[-1]:
        size = min(size for size in PROMPTS if size >= arguments.d)
        entry, together = f"store_rows_{size}", WARPS * 32 * 8 // size
    else:
        entry, together = f"store_kv_{min(size for size in STORES if size >= arguments.d)}", WARPS
    shares = min(-(-(heads + 2 * kv_heads) // together), max(1, FILL * device.sms // rows))
    return Launch(device, unit, entry, (rows, shares, 1), THREADS, arguments, pdl=True)


def _turns(arguments: Any, cos: Tensor | None, rope: str) -> None:
    arguments.rotary = 0 if cos is None else cos.shape[1]
    arguments.interleaved = rope == "interleaved"


def attend_token(  # noqa: PLR0913
    op: str,
    outputs: list[Tensor],
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
) -> Launch | None:
    rows = qkv.shape[0]
    if rows == 0:
        return None
    device, fp8 = cuda.describe(qkv.device.index), dtype == torch.float8_e4m3fn
    if fp8 and device.number < 89:
        raise cuda.no_fp8(device)
    arguments = TokenArguments(heads=heads, fp8=fp8, scale=scale, eps=eps, tokens=1)
    unit = kv_units(KINDS[qkv.dtype], _cache(arguments, k, v, k_scale, v_scale))[2]
    _turns(arguments, cos, rope)
    return _attention(
        unit, "token", arguments, rows, qkv, rows * 4, rows * heads * k.shape[3] * qkv.element_size()
    )


def attend_text(  # noqa: PLR0913
    op: str,
    outputs: list[Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_to: Tensor | None,
    v_to: Tensor | None,
    causal: bool,
    scale: float,
    dtype: torch.dtype | None = None,
) -> Launch | None:
    batch, tokens, heads, channels = q.shape
    if batch * tokens == 0:
        return None
    device, out = cuda.describe(q.device.index), None if dtype is None else CODES[dtype]
    shape = text_shape(device, heads, channels, out is not None)
    if shape is None:
        raise ZqError(
            f"zq::{op} does not fit {device.arch}, which has no clusters of blocks or too little shared "
            f"memory; use {'torch' if out is None else 'attend_text and quantize its rows'}"
        )
    arguments = TextArguments(
        heads=heads, kv_heads=k.shape[2], tokens=tokens, d=channels, causal=causal, per=shape.per, scale=scale
    )
    for name, x in (("q", q), ("k", k), ("v", v)):
        _place(arguments, name, x)
    for name, x in (("k_to", k_to), ("v_to", v_to)):
        if x is not None:
            _place(arguments, name, x.transpose(1, 2))
    return Launch(
        device,
        text_unit(KINDS[q.dtype], out),
        shape.entry,
        (shape.blocks, -(-tokens // ROWS), batch),
        THREADS * shape.per,
        arguments,
        shared=shape.shared,
        cluster=1 if out is None else shape.blocks,
        pdl=True,
    )


class TextShape(NamedTuple):
    """Entry of text.cu, heads of a block, blocks that have all heads, bytes of shared memory."""

    entry: str
    per: int
    blocks: int
    shared: int


def text_shape(device: cuda.Device, heads: int, channels: int, codes: bool) -> TextShape | None:
    """How 64 tokens with `heads` heads are computed, those of `codes` in one cluster; None: not at all."""
    per = 2 if codes and heads > TOGETHER else 1
    size = min(size for size in TEXTS if size >= channels)
    shared = per * 5 * ROWS * (2 * size + 16) + codes * 4 * ROWS * TEXT_HEADS
    if shared > device.shared or (codes and (device.number < CLUSTERS or heads > TEXT_HEADS)):
        return None
    return TextShape(f"text_{size}", per, -(-heads // per), shared)


def _place(arguments: Any, name: str, x: Tensor) -> None:
    """Strides of x [B, S, H, D] in bytes."""
    for of, stride in zip(("batch", "token", "head"), x.stride()[:3], strict=True):
        setattr(arguments, f"{name}_{of}", stride * x.element_size())


LAUNCH: dict[str, Callable[..., Launch | None]] = {
    "decode_attention": decode_attention,
    "store_kv": store_kv,
    "attend_token": attend_token,
    "attend_text": attend_text,
    "attend_text_codes": attend_text,
}
