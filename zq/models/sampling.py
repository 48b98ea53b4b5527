"""Windows of text that the model writes itself: calibration data that generalises beyond one text.

A text shows a quantizer one subject; what a model writes from arbitrary beginnings shows what its weights
are used for. Every window is made of short pieces, each sampled from its own beginning by transformers'
`generate` (temperature 1, the TOP_K likeliest tokens), because many beginnings teach more than long
continuations. After LLM-QAT (Liu et al. 2023, arXiv:2305.17888, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from zq.models.skeleton import Read, Skeleton

PIECE = 256  # tokens
TOP_K = 50
CACHE_BYTES = {"cpu": 256 << 20, "cuda": 8 << 30}  # of keys and values: how many pieces are written at once


def pieces(length: int) -> tuple[int, int]:
    """(pieces per window, tokens per piece) for windows of `length` tokens."""
    count = max(1, round(length / PIECE))
    return count, math.ceil(length / count)


def write_windows(
    skeleton: Skeleton,
    read: Read,
    beginnings: Tensor,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """beginnings int64 [S, P] of S pieces -> windows int64 [S / pieces per window, length], on the CPU.

    Loads the whole model for the time it writes. `progress` gets (pieces written, pieces).
    """
    per_window, size = pieces(length)
    _load_all(skeleton, read)
    try:
        written = []
        for i, part in enumerate(beginnings.split(_at_once(skeleton, size))):
            written.append(_write(skeleton, part, size, seed + i))
            progress(sum(len(w) for w in written), len(beginnings))
    finally:
        _unload_all(skeleton)
    return torch.cat(written).reshape(-1, per_window * size)[:, :length].contiguous()


@torch.no_grad()
def _write(skeleton: Skeleton, beginnings: Tensor, size: int, seed: int) -> Tensor:
    model: Any = skeleton.model
    kept = model.generation_config
    # No end token: a text that ends is followed by another one, as in what the model was trained on.
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=TOP_K, pad_token_id=0, cache_implementation="static", disable_compile=True
    )
    new = size - beginnings.shape[1]
    place = torch.device(skeleton.device)
    # The last position of each row is a strided view, for which torch's CPU matmul copies the whole weight
    # once per row: gigabytes and seconds.
    dense = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: args[0].contiguous())
    try:
        with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = beginnings.to(place)
            ids = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new)
    finally:
        dense.remove()
        model.generation_config = kept
    return ids.cpu()


def _at_once(skeleton: Skeleton, size: int) -> int:
    """How many pieces are written together: a matter of the model and the kind of device only, so that a
    seed gives the same text on the same kind of machine."""
    config: Any = skeleton.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    per_piece = 2 * skeleton.n_blocks * key_heads * width * skeleton.dtype.itemsize * size
    return min(4096, max(1, CACHE_BYTES[torch.device(skeleton.device).type] // per_piece))


def _load_all(skeleton: Skeleton, read: Read) -> None:
    skeleton.load_outside(read)
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, read)
    skeleton.load_tail(read)


def _unload_all(skeleton: Skeleton) -> None:
    skeleton.unload_outside()
    for i in range(skeleton.n_blocks):
        skeleton.unload_block(i)
    skeleton.unload_tail()
