"""Decode steps on zq's own attention and cache: what they compute, and when they are taken."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import zq
from tests.runtime.quantized import W4A16, distance, force_kernels, quantized
from tests.runtime.stepping import TOKENS, forced, generated, padded, stepping, torchs_own
from tests.tiny import TINY, random_model, token_ids
from zq.runtime import graphs
from zq.runtime.cache import cache_argument, make_cache

DECODERS = [name for name in TINY if "bert" not in name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_against_torchs_attention(
    name: str, dtype: torch.dtype, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows padded on the left; no further from float32 than with torch's attention, but for luck."""
    model, exact = stepping(name, W4A16, dtype)
    given = padded()
    found = generated(model, **given)
    torchs_own(monkeypatch)
    wanted = generated(model, **given)
    assert [own for own, _ in steps] == [True] * (TOKENS - 1) + [False] * (TOKENS - 1)
    near, far = (
        distance(logits, forced(exact, ids, given["attention_mask"])) for ids, logits in (found, wanted)
    )
    assert near < 1.25 * far
    same = int(found[0].eq(wanted[0]).all(0).long().cumprod(0).sum()) - 9
    assert distance(found[1][: same + 1], wanted[1][: same + 1]) < 2 * far
    if same < TOKENS:  # then two tokens were as good as each other
        top = wanted[1][same].float().topk(2).values
        differ = found[0][:, 9 + same] != wanted[0][:, 9 + same]
        assert ((top[:, 0] - top[:, 1])[differ] < 8 * far * wanted[1][same].float().std()).all()


@pytest.mark.parametrize("name", ["llama", "qwen3", "gptj", "gpt_neox", "bloom", "gpt2", "opt"])
def test_more_tokens_than_one_tile_and_prompts_of_one(name: str, steps: list[Any]) -> None:
    model, exact = stepping(name, W4A16)
    for given, tokens in ((padded(2, 20), 30), ({"input_ids": token_ids(1, 1)}, 12)):
        sequences, logits = generated(model, tokens, **given)
        mask = given.get("attention_mask", torch.ones_like(given["input_ids"]))
        assert distance(logits, forced(exact, sequences, mask)) < 4e-2
    assert all(own for own, _ in steps)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_quantized_cache(name: str, kv: str, steps: list[Any]) -> None:
    """Against the same cache, filled and dequantized by its own `update`."""
    model, _ = stepping(name, W4A16)
    given, found = padded(), []
    for on in (True, False):
        model.zq_runner.on = on
        cache = make_cache(model.config, 3, 20, torch.bfloat16, kv)
        found.append((*generated(model, **given, past_key_values=cache), cache))
        assert int(cache.get_seq_length()) == 9 + TOKENS - 1
    assert [own for own, _ in steps] == [True] * (TOKENS - 1)
    same = int(found[0][0].eq(found[1][0]).all(0).long().cumprod(0).sum()) - 9
    assert same >= 1
    assert distance(found[0][1][: same + 1], found[1][1][: same + 1]) < 4e-2
    for mine, theirs in zip(found[0][2].layers, found[1][2].layers, strict=True):
        kept = slice(0, 9 + min(same, TOKENS - 1))
        assert distance(mine.key_scale[:, :, kept], theirs.key_scale[:, :, kept]) < 4e-2
        assert mine.keys.dtype == theirs.keys.dtype != torch.bfloat16


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_optimize_with_kv(kv: str, on: bool, steps: list[Any]) -> None:
    """generate() makes quantized caches by itself, in memory that stays where it is."""
    model, _ = stepping("qwen3", W4A16)
    assert zq.optimize(model, kv=kv) is model
    model.zq_runner.on = on
    given, places = padded(), set()
    cache = make_cache(model.config, 3, 20, torch.bfloat16, kv)
    wanted = generated(model, **given, past_key_values=cache)
    for _ in range(2):
        out = model.generate(
            **given, max_new_tokens=TOKENS, pad_token_id=0, eos_token_id=None, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(out.sequences, wanted[0])
        assert out[cache_argument(model)].kv == kv
        places.add(out[cache_argument(model)].layers[1].key_scale.data_ptr())
        del out
    assert len(places) == 1
    assert len(model.zq_runner.seen) == 2 * on, "one for the given cache, one for all others"
    zq.optimize(model)
    out = model.generate(**given, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert getattr(out[cache_argument(model)], "kv", None) is None


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj"])
def test_masks_with_holes_stay_with_torchs_attention(
    name: str, steps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = stepping(name, W4A16)
    given = padded()
    given["attention_mask"][0, 4] = 0
    found = generated(model, **given)
    assert [own for own, _ in steps] == [False] * (TOKENS - 1)
    torchs_own(monkeypatch)
    assert torch.equal(generated(model, **given)[1], found[1])


def test_a_quantized_cache_with_holes_goes_through_update(steps: list[Any]) -> None:
    model, _ = stepping("llama", W4A16)
    given = padded()
    given["attention_mask"][0, 4] = 0
    found = []
    for on in (True, False):
        model.zq_runner.on = on
        cache = make_cache(model.config, 3, 20, torch.bfloat16, "int8")
        found.append(generated(model, **given, past_key_values=cache)[1])
    assert not steps
    assert torch.equal(*found)


def test_the_device_is_asked_once_in_a_call(steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    original = graphs.first_seen

    def watched(*args: Any) -> Any:
        asked.append(1)
        return original(*args)

    monkeypatch.setattr(graphs, "first_seen", watched)
    model, _ = stepping("llama", W4A16)
    for number in (1, 2):
        generated(model, **padded())
        assert len(asked) == number
    assert len(steps) == 2 * (TOKENS - 1)
    generated(model, 3, input_ids=token_ids(1, 1))
    assert len(asked) == 3


def test_steps_without_generate(steps: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is asked about: its mask may be any, and so may its positions."""
    model, _ = stepping("llama", W4A16)
    ids = token_ids(2, 8)
    holes = torch.ones(2, 9, dtype=torch.int64)
    holes[1, 3] = 0
    left = torch.ones(2, 9, dtype=torch.int64)
    left[0, :3] = 0
    cases: list[tuple[Tensor | None, int, bool]] = [
        (None, 8, True),
        (left, 8, True),
        (holes, 8, False),
        (left[:, :5], 8, False),
        (left * 0, 8, False),
        (left, 5, True),
        (left, 40, False),
    ]
    found: list[list[Tensor]] = []
    for _ in range(2):
        found.append([])
        for mask, place, own in cases:
            cache = make_cache(model.config, 2, 16, torch.bfloat16)
            with torch.no_grad():
                model(input_ids=ids[:, :8], past_key_values=cache, use_cache=True)
                given = {"position_ids": torch.full((2, 1), place), "past_key_values": cache}
                out = model(input_ids=ids[:, :1], attention_mask=mask, **given)
            assert int(cache.get_seq_length()) == 9
            assert steps[-1][0] is (own and len(found) == 1)
            found[-1].append(out.logits)
        torchs_own(monkeypatch)
    for mine, theirs in zip(*found, strict=True):
        assert distance(mine, theirs) < 3e-2


@pytest.mark.parametrize(
    ("rope", "table"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, True),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}, True),
        ({"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, True),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, False),
    ],
)
def test_rotary_tables(rope: dict[str, Any], table: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of transformers' module, its scaling included; a type that looks at the length keeps it."""
    force_kernels(monkeypatch)
    config = TINY["llama"]()
    config.rope_parameters = rope
    model = quantized("llama", W4A16, torch.bfloat16, random_model(config, torch.bfloat16))
    plain = copy.deepcopy(model.model.rotary_emb)
    zq.optimize(model)
    buffers = model.zq_runner.shared.around.buffers(2, 48, torch.bfloat16, torch.device("cpu"))
    assert (buffers.turns is not None) is table
    if buffers.turns is not None:
        wanted = plain(torch.empty(0, dtype=torch.bfloat16), torch.arange(48)[None])
        assert torch.equal(buffers.turns, torch.cat(wanted))
    model.zq_runner.on = True
    given = padded()
    found = generated(model, **given)
    torchs_own(monkeypatch)
    assert distance(found[1][:2], generated(model, **given)[1][:2]) < 3e-2


def test_windows(steps: list[Any]) -> None:
    """Where a cache is longer than a sliding window, attention is torch's, with its mask."""
    for window, own in ((6, False), (32, True)):
        config = TINY["mistral"]()
        config.sliding_window = window
        model = quantized("mistral", W4A16, torch.bfloat16, random_model(config, torch.bfloat16))
        zq.optimize(model)
        found = []
        for on in (True, False):
            model.zq_runner.on = on
            cache = make_cache(model.config, 3, 20, torch.bfloat16)
            found.append(generated(model, **padded(), past_key_values=cache)[1])
        assert distance(found[0][:2], found[1][:2]) < 3e-2
        assert {step[0] for step in steps} == {own}
        steps.clear()


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj"])
def test_a_copy_of_an_optimized_model_steps_by_itself(name: str, steps: list[Any]) -> None:
    model, _ = stepping(name, W4A16)
    wanted = generated(model, **padded())[1]
    model.zq_runner.on = False  # a copy would capture
    other = copy.deepcopy(model)
    other.zq_runner.on = True
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(generated(other, **padded())[1], wanted)
    assert all(own for own, _ in steps)
