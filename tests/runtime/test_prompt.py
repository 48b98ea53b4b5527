"""Prompts over an empty static cache are what the model computes without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.runtime.quantized import W4A16, distance
from tests.runtime.stepping import padded, stepping
from tests.tiny import TINY, token_ids
from zq.runtime import graphs
from zq.runtime.cache import cache_argument

READ = [name for name in TINY if "bert" not in name and "bloom" not in name]  # ALiBi wants the mask


def places_of(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(1) - 1).clamp_min(0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READ)
def test_logits_and_cache(name: str, dtype: torch.dtype, read: list[Any]) -> None:
    """Padded on the left and not; the cache holds what transformers would put there."""
    model, _ = stepping(name, W4A16, dtype)
    argument = cache_argument(model)
    for given in (padded(), {"input_ids": token_ids(2, 7), "attention_mask": torch.ones(2, 7).long()}):
        mask = given["attention_mask"].bool()
        found = []
        for on in (True, False):
            model.zq_runner.on = on
            cache = StaticCache(config=model.config, max_cache_len=24)
            heads, width = _heads(model)
            cache.early_initialization(mask.shape[0], heads, width, dtype, model.device)
            places = places_of(given["attention_mask"])
            out = model(**given, position_ids=places, **{argument: cache}, use_cache=True)
            assert out[argument] is cache
            assert int(cache.get_seq_length()) == mask.shape[1]
            found.append((out.logits[mask], [(x.keys, x.values) for x in cache.layers]))
        bound = 1e-5 if dtype == torch.float32 else 3e-2
        assert distance(found[0][0], found[1][0]) < bound
        for mine, theirs in zip(found[0][1], found[1][1], strict=True):
            for a, b in zip(mine, theirs, strict=True):
                kept = mask[:, None, :, None]
                length = mask.shape[1]
                assert distance(a[:, :, :length] * kept, b[:, :, :length] * kept) < bound
                assert not a[:, :, length:].any()
    assert read == [(3, 9), (2, 7)]


def _heads(model: Any) -> tuple[int, int]:
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@torch.no_grad()
def test_what_is_no_prompt_of_an_empty_cache(read: list[Any]) -> None:
    """A second piece of a prompt, a mask of four dimensions, a longer one than the cache: as transformers."""
    model, _ = stepping("llama", W4A16, torch.float32)
    argument, ids = cache_argument(model), token_ids(1, 12)
    model.zq_runner.on = False
    wanted = model(input_ids=ids, use_cache=False).logits
    model.zq_runner.on = True
    cache = StaticCache(config=model.config, max_cache_len=16)
    cache.early_initialization(1, *_heads(model), torch.float32, model.device)
    pieces = []
    for begin in (0, 6):
        place = torch.arange(begin, begin + 6)[None]
        part = ids[:, begin : begin + 6]
        pieces.append(model(input_ids=part, position_ids=place, use_cache=True, **{argument: cache}).logits)
    assert read == [(1, 6)]
    assert distance(torch.cat(pieces, 1), wanted) < 1e-5
    assert int(cache.get_seq_length()) == 12


@torch.no_grad()
def test_long_prompts_need_no_buffers(read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping("llama", W4A16, torch.float32)
    found = []
    for most in (2**24, 3 * 9 * 64 - 1):
        monkeypatch.setattr(graphs, "LONG", most)
        found.append(model.generate(**padded(), max_new_tokens=3, pad_token_id=0, eos_token_id=None))
    assert torch.equal(*found)
    assert read == [(3, 9)] * 2
    assert len(model.zq_runner.prompts) == 1


def test_shapes_of_prompts_are_forgotten(read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest first; graphs of steps stay."""
    monkeypatch.setattr(graphs, "LIMIT", 2)
    model, _ = stepping("llama", W4A16, torch.float32)
    for length in (5, 6, 7, 7):
        model.generate(token_ids(1, length), max_new_tokens=3, pad_token_id=0, eos_token_id=None)
    assert [key[2] for key in model.zq_runner.prompts] == [6, 7]
    assert [seen.calls for seen in model.zq_runner.prompts.values()] == [1, 2]
    assert len(model.zq_runner.seen) == 1
