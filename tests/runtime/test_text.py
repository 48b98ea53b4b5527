"""A text without a cache is what transformers computes, and so is the cache that it leaves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.runtime.quantized import W4A16, distance
from tests.runtime.stepping import padded, stepping
from tests.runtime.test_prompt import READ, places_of
from tests.tiny import token_ids
from zq.runtime import graphs
from zq.runtime.cache import cache_argument


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", READ)
def test_logits_and_cache(name: str, dtype: torch.dtype, read: list[Any]) -> None:
    """With and without mask and positions, padded on the left with them; twice, with other tokens."""
    model, _ = stepping(name, W4A16, dtype)
    argument, bound = cache_argument(model), 1e-5 if dtype == torch.float32 else 3e-2
    whole, left = torch.ones(3, 9).long(), padded()["attention_mask"]
    for seed in (0, 1):
        ids = token_ids(3, 9, seed=seed)
        for given in (
            {"input_ids": ids},
            {"input_ids": ids, "attention_mask": whole, "position_ids": torch.arange(9)[None] + 2},
            {"input_ids": ids, "attention_mask": left, "position_ids": places_of(left)},
        ):
            seen = given.get("attention_mask", whole).bool()
            found = []
            for on in (True, False):
                model.zq_runner.on = on
                out = model(**given)
                assert type(out[argument]) is DynamicCache
                assert out[argument].get_seq_length() == 9
                found.append((out.logits[seen], [(x.keys, x.values) for x in out[argument].layers]))
            assert distance(found[0][0], found[1][0]) < bound
            kept = seen[:, None, :, None]
            for mine, theirs in zip(found[0][1], found[1][1], strict=True):
                for a, b in zip(mine, theirs, strict=True):
                    assert a.shape == b.shape
                    assert distance(a * kept, b * kept) < bound
    assert read == [(3, 9)] * 6


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("most", [2**24, 0])
def test_the_cache_is_the_callers(
    name: str, most: int, read: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another text changes nothing in it, and the first one goes on from it; long texts share no memory."""
    monkeypatch.setattr(graphs, "LONG", most)
    model, _ = stepping(name, W4A16, torch.float32)
    argument, ids = cache_argument(model), token_ids(2, 12)
    wanted = model(input_ids=ids, use_cache=False)
    assert wanted.get(argument) is None
    first = model(input_ids=ids[:, :8], logits_to_keep=1)
    assert first.logits.shape[1] == 1
    model(input_ids=token_ids(2, 8, seed=5))
    rest = model(input_ids=ids[:, 8:], **{argument: first[argument]})
    assert distance(torch.cat((first.logits, rest.logits), 1), wanted.logits[:, 7:]) < 1e-5
    assert first[argument].get_seq_length() == 12
    assert read == [*[(2, 12)] * (most > 0), (2, 8), (2, 8)]
    assert len(model.zq_runner.texts) == (3 if most else 0)
    assert (model.zq_runner.memory.flat is None) == (not most)


@torch.no_grad()
def test_larger_texts_move_what_smaller_ones_have(read: list[Any]) -> None:
    """Then what was captured there is dropped; the same without a larger one stays."""
    model, _ = stepping("llama", W4A16, torch.float32)
    runner, found = model.zq_runner, []
    for length in (5, 30, 29, 30):
        found.append(model(input_ids=token_ids(1, length)).logits)
    assert [key[1] for key in runner.texts] == [29, 30]
    assert torch.equal(found[1], found[3])
    runner.forget()
    assert not runner.texts
    assert runner.memory.flat is None


@torch.no_grad()
def test_what_runs_as_before(read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding without positions, a mask of four dimensions, hidden states, gradients, autocast, texts in a
    row, long ones that want no cache."""
    model, _ = stepping("llama", W4A16, torch.float32)
    ids, mask = token_ids(2, 6), torch.ones(2, 6).long()
    wanted = model(input_ids=ids).logits
    mask[1, 4:] = 0
    assert distance(model(input_ids=ids, attention_mask=mask).logits[0], wanted[0]) < 1e-5
    four = torch.zeros(2, 1, 6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), -1e9)
    assert distance(model(input_ids=ids, attention_mask=four).logits, wanted) < 1e-5
    assert model(input_ids=ids, output_hidden_states=True).hidden_states is not None
    assert read == [(2, 6)]
    with torch.enable_grad():
        assert model(input_ids=ids).logits.shape == wanted.shape
    with torch.autocast("cpu"):
        assert distance(model(input_ids=ids).logits, wanted) < 3e-2
    row = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    two = model(input_ids=ids, position_ids=row, use_cache=False).logits
    assert distance(two[:, 3:], model(input_ids=ids[:, 3:]).logits) < 1e-5
    model.config._attn_implementation = "flash"
    assert model.zq_runner._text(None, ids, {}, torch.float32) is None
    model.config._attn_implementation = "sdpa"
    monkeypatch.setattr(graphs, "LONG", 0)
    assert distance(model(input_ids=ids, use_cache=False).logits, wanted) < 1e-5
    assert read == [(2, 6), (2, 3)]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_looks_into_a_model(name: str, read: list[Any]) -> None:
    """Hidden states by the config, and hooks on a block, see what they saw before."""
    model, _ = stepping(name, W4A16, torch.float32)
    ids, found, runner = token_ids(2, 6), [], model.zq_runner
    block = runner.blocks[0]
    hook = block.register_forward_hook(lambda *seen: found.append(seen[-1]))
    for runner.on in (True, False):
        model(input_ids=ids)
    hook.remove()
    first = [each[0] if isinstance(each, tuple) else each for each in found]
    assert distance(*first) == 0
    model.config.output_hidden_states = True
    for runner.on in (True, False):
        found.append(model(input_ids=ids).hidden_states)
    assert distance(found[-2][1], found[-1][1]) == 0
    assert not read


@torch.no_grad()
def test_logits_that_are_too_many_are_not_kept(read: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = stepping("llama", W4A16, torch.float32)
    ids = token_ids(2, 6)
    wanted = model(input_ids=ids).logits
    model.zq_runner.forget()
    monkeypatch.setattr(graphs, "MANY", wanted.numel() - 1)
    assert torch.equal(model(input_ids=ids).logits, wanted)
    assert not model.zq_runner.texts
    assert distance(model(input_ids=ids, logits_to_keep=1).logits, wanted[:, -1:]) < 1e-5
    assert len(model.zq_runner.texts) == 1
    assert read == [(2, 6)] * 3


@torch.no_grad()
def test_threads(read: list[Any]) -> None:
    """Texts of several threads at once do not meet in what is shared."""
    model, _ = stepping("llama", W4A16, torch.float32)
    texts = [token_ids(2, 6, seed=seed) for seed in range(4)]
    wanted = [model(input_ids=ids).logits for ids in texts]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            found = pool.map(torch.no_grad()(lambda ids: model(input_ids=ids).logits), texts)
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
