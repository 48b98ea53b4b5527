"""What the operators of attention compute, in plain torch; see zq.kernels.reference.

Attention: scores and probabilities in float64, one rounding at the end. The bias of ALiBi is rounded to the
dtype of q, as transformers' BLOOM does, and counts positions from `first`, as its mask does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.kernels.reference import codes, quantize, rms_norm

LOW = -6e4  # what a mask adds to hide a key: less than this


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
) -> Tensor:
    rows, heads, channels = q.shape
    kv_heads, length = k.shape[1:3]
    place = torch.arange(length, device=q.device)
    first = first.clamp_min(0)[:, None]
    seen = (place >= first) & (place <= last[:, None])  # [B, L]
    unseen = ~seen[:, None, :, None]
    keys, values = (_wide(*each).masked_fill(unseen, 0) for each in ((k, k_scale), (v, v_scale)))
    queries = q.double().view(rows, kv_heads, heads // kv_heads, channels)
    scores = (queries @ keys.transpose(-1, -2)).view(rows, heads, length) * scale
    if slopes is not None:
        scores = scores + (slopes[:, None] * (place - first)[:, None, :]).to(q.dtype).double()
    chances = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    chances = chances.masked_fill(~seen[:, None], 0)  # a row without any is NaN
    out = chances.view(rows, kv_heads, heads // kv_heads, length) @ values
    return out.reshape(rows, heads, channels).to(q.dtype)


def _wide(x: Tensor, scale: Tensor | None) -> Tensor:
    return x.double() if scale is None else x.double() * scale.double()[..., None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """x [B, H, D], cos and sin [B, R]: transformers' apply_rotary_pos_emb on the first R channels, each step
    rounded to the dtype of x."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    if rope == "half":
        lower, upper = turned.chunk(2, -1)
        other = torch.cat((-upper, lower), -1)
    else:
        other = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    return torch.cat((turned * cos[:, None] + other * sin[:, None], rest), -1)


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
) -> Tensor:
    rows, channels = qkv.shape[0], k.shape[3]
    q, key, value = qkv.view(rows, heads + 2 * kv_heads, channels).split((heads, kv_heads, kv_heads), 1)
    q = q if q_norm is None else rms_norm(q, q_norm, eps)
    key = key if k_norm is None else rms_norm(key, k_norm, eps)
    if cos is not None and sin is not None:
        q, key = (rotate(x, cos, sin, rope) for x in (q, key))
    inside = (position >= 0) & (position < k.shape[2])
    at = (inside.nonzero()[:, 0] // tokens, slice(None), position[inside].long())
    for x, kept, scale in ((key, k, k_scale), (value, v, v_scale)):
        x = x[inside].contiguous()
        if scale is None:
            kept[at] = x
        else:
            codes, steps = quantize(x.reshape(-1, channels), kept.dtype)
            kept.view(torch.uint8)[at] = codes.view(torch.uint8).view(x.shape)
            scale[at] = steps.view(x.shape[:2])
    return q.clone(memory_format=torch.contiguous_format)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """store_kv at `last`, decode_attention, then the rows of heads in `dtype`."""
    cache = k, v, k_scale, v_scale
    q = store_kv(qkv, *cache, last, cos, sin, heads, kv_heads, rope, q_norm, k_norm, eps)
    out = decode_attention(q, *cache, first, last, scale, slopes)
    return codes(out.flatten(1), dtype)


def attend_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    k_to: Tensor | None,
    v_to: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    batch, tokens, heads, channels = q.shape
    for x, kept in ((k, k_to), (v, v_to)):
        if kept is not None:
            kept[:, :, :tokens] = x.transpose(1, 2)
    group = heads // k.shape[2]
    queries = q.transpose(1, 2).double()
    keys, values = (x.transpose(1, 2).double().repeat_interleave(group, 1) for x in (k, v))
    scores = queries @ keys.transpose(-1, -2) * scale
    if mask is not None:
        added = mask.double()[:, None, None]
        scores = (scores + added).masked_fill(added < LOW, -torch.inf)
    if causal:
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    chances = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    out = chances @ values
    return out.transpose(1, 2).reshape(batch * tokens, heads * channels).to(q.dtype)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """attend_text, then its rows in `dtype`."""
    return codes(attend_text(q, k, v, mask, k_to, v_to, causal, scale), dtype)
