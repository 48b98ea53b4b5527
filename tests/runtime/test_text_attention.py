"""Texts and prompts on zq's own attention are what they are on torch's."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import zq
from tests.runtime.quantized import W4A8, W4A16, distance, force_kernels, quantized
from tests.runtime.stepping import Seen, padded, stepping
from tests.runtime.test_prompt import READ, places_of
from tests.tiny import TINY, token_ids
from zq.kernels.select import units_for
from zq.models.families import FAMILIES
from zq.runtime import graphs
from zq.runtime.blocks import attention
from zq.runtime.optimize import attention_units
from zq.spec import Scheme

PLAIN, CODES, STORE = "zq.attend_text", "zq.attend_text_codes", "zq.store_kv"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether texts go through zq's attention, as on a GPU that has room for them."""
    force_kernels(monkeypatch)
    on = [True]
    monkeypatch.setattr(attention, "text_fits", lambda *_: on[0])
    return on


def called(model: Any, **given: Any) -> tuple[Any, Counter[str]]:
    with torch.no_grad(), Seen() as seen:
        out = model(**given)
    return out, seen.ops


@pytest.mark.parametrize("scheme", [W4A8, W4A16])
@pytest.mark.parametrize("name", READ)
def test_decoders(name: str, scheme: str, own: list[bool]) -> None:
    """Padded on the left and not: logits and the cache; in as few operators as can be."""
    model, _ = stepping(name, scheme)
    blocks = len(model.zq_runner.blocks)
    bare = name in ("gpt2", "opt", "opt-post")  # no rotary embedding: heads are parts of the product
    left = padded()["attention_mask"]
    texts = [{}, {"attention_mask": left, "position_ids": places_of(left)}]
    for more in texts:
        seen, found = more.get("attention_mask", torch.ones(3, 9)).bool(), []
        for own[0] in (True, False):
            out, ops = called(model, input_ids=token_ids(3, 9), **more)
            cache = out[model.zq_runner.cache_name]
            kept = [x * seen[:, None, :, None] for y in cache.layers for x in (y.keys, y.values)]
            found.append((out.logits[seen], torch.cat([x.flatten() for x in kept])))
            read = own[0] and bare
            wanted = {CODES: read and scheme == W4A8, PLAIN: read and scheme == W4A16, STORE: not read}
            if name != "gptj":  # whose rotary embedding of prompts is transformers' own
                assert {op: ops[op] for op in wanted} == {op: blocks * n for op, n in wanted.items()}
        for mine, theirs in zip(*found, strict=True):
            assert distance(mine, theirs) < (4e-2 if scheme == W4A8 else 2e-2)


@pytest.mark.parametrize("codes", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_padded_prompt_in_a_longer_cache(name: str, codes: bool, own: list[bool], monkeypatch: Any) -> None:
    """The same tokens as without, on a device that makes codes of so many heads, and on one that does not."""
    model, _ = stepping(name, W4A8)
    given = {**padded(), "max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": None}
    found = []
    for on in (True, False):
        ways = (codes, False) if on else ()
        monkeypatch.setattr(attention, "text_fits", lambda _, __, wanted, ways=ways: wanted in ways)
        with Seen() as seen:
            out = model.generate(**given, return_dict_in_generate=True, output_logits=True)
        found.append(out.logits[0])
        del out  # whose cache the next call takes
        blocks = len(model.zq_runner.blocks)
        wanted = {CODES: on and codes, PLAIN: on and not codes, STORE: not on}
        assert {op: seen.ops[op] for op in wanted} == {op: blocks * n for op, n in wanted.items()}
    assert distance(*found) < 3e-2


def test_a_mask_of_other_strides(own: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long text, whose mask is not copied into buffers."""
    model, _ = stepping("gpt2", W4A8)
    monkeypatch.setattr(graphs, "LONG", 0)
    mask = padded()["attention_mask"]
    given = {"input_ids": token_ids(3, 9), "position_ids": places_of(mask)}
    first, ops = called(model, attention_mask=mask.T.contiguous().T, **given)
    second, _ = called(model, attention_mask=mask, **given)
    assert ops[CODES] == len(model.zq_runner.blocks)
    assert torch.equal(first.logits, second.logits)


@pytest.mark.parametrize("scheme", [W4A8, W4A16])
@pytest.mark.parametrize("name", TINY)
def test_what_is_loaded_is_in_a_bundle(name: str, scheme: str, own: list[bool]) -> None:
    """So that a machine without a compiler needs nothing else; only what can be called."""
    model = zq.optimize(quantized(name, scheme))
    arch = FAMILIES[model.config.model_type]
    device = torch.device("cuda", 0)
    found = attention_units(model, model.zq_runner.shared, device, "int8")
    bundled = units_for([Scheme.parse(scheme)], "bf16", decoder=not arch.encoder)
    assert set(found) <= {unit.name for unit in bundled}
    texts = [unit for unit in found if unit.startswith("text")]
    bare = name in ("gpt2", "opt", "opt-post")
    assert texts == (["text_int8_bf16" if scheme == W4A8 else "text_bf16"] if bare else [])


def test_what_stays_torchs(own: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Long texts, other attention functions, masks of four dimensions, pieces of a text, other dtypes."""
    model, _ = stepping("gpt2", W4A8)
    ids = token_ids(2, 8)
    assert called(model, input_ids=ids)[1][CODES] == 2
    four = torch.zeros(2, 1, 8, 8, dtype=torch.bfloat16).masked_fill(torch.ones(8, 8).triu(1).bool(), -1e9)
    assert called(model, input_ids=ids, attention_mask=four)[1][CODES] == 0
    first, _ = called(model, input_ids=ids[:, :4])
    given = {model.zq_runner.cache_name: first[model.zq_runner.cache_name]}
    assert called(model, input_ids=ids[:, 4:], **given)[1][CODES] == 0
    monkeypatch.setattr(attention, "TEXT", 7)
    assert called(model, input_ids=ids)[1][CODES] == 0
    monkeypatch.setattr(attention, "TEXT", 8)
    model.config._attn_implementation = "eager"
    assert called(model, input_ids=ids)[1][CODES] == 2, "in a prompt it is sdpa too"
    narrow, _ = stepping("gpt2", W4A8, torch.float32)
    assert called(narrow, input_ids=ids)[1][CODES] == 0
