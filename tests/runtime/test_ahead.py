"""generate() a step ahead of the device gives what transformers' own loop gives, and asks later."""

from __future__ import annotations

from collections import Counter
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LogitsProcessor,
    MaxLengthCriteria,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

import zq
from tests.letters import save_tokenizer
from tests.runtime.quantized import W4A16, W8A8, quantized
from tests.runtime.stepping import padded, stepping, without_windows
from tests.tiny import random_model, token_ids
from zq.runtime import ahead, graphs

FAMILIES = ["llama", "mistral", "qwen3", "gpt2", "opt", "gptj", "gpt_neox", "bloom"]
LENGTH, TOKENS = 9, 12  # of the prompts, and new ones


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often `sample` was called, and a static step made."""
    counts: Counter[str] = Counter()

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def call(*args: Any) -> Any:
            counts[name] += 1
            return original(*args)

        monkeypatch.setattr(module, name, call)

    counted(ahead, "sample")
    counted(graphs, "static_step")
    return counts


def optimized(name: str, **changes: Any) -> Any:
    config = without_windows(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = zq.optimize(quantized(name, W8A8, torch.float32, random_model(config)))
    model.zq_runner.on = True
    return model


def both(model: Any, make: Any = dict, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a seeded call, ahead and with transformers' loop; the state of the generator is the same
    afterwards. make: more arguments, anew for each."""
    found = []
    fits = ahead.fits
    given = {**padded(3, LENGTH), "max_new_tokens": TOKENS, "pad_token_id": 0, "eos_token_id": None, **given}
    for way in (fits, lambda *_: False):
        ahead.fits = way  # type: ignore[assignment]
        try:
            torch.manual_seed(5)
            found.append((model.generate(**given, **make()), torch.get_rng_state()))
        finally:
            ahead.fits = fits
    assert torch.equal(found[0][1], found[1][1])
    return found[0][0], found[1][0]


def ends(tokens: torch.Tensor, *steps: int) -> list[int]:
    """The token that each row has drawn in a step."""
    return [int(row[LENGTH + step]) for row, step in zip(tokens, steps, strict=True)]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_rows_that_end_at_different_steps(name: str, sampled: bool, made: Counter[str]) -> None:
    model = optimized(name)
    chosen: dict[str, Any] = {"do_sample": sampled, "temperature": 1.5, "top_k": 40} if sampled else {}
    free, wanted = both(model, **chosen)
    assert torch.equal(free, wanted)
    for steps in ((2, 5, 8), (0, 0, 0), (3, 3, 4)):
        found, wanted = both(model, **chosen, eos_token_id=ends(free, *steps))
        assert torch.equal(found, wanted)
        assert found.shape[1] <= LENGTH + max(steps) + 1 < free.shape[1]
    own = "prepare_inputs_for_generation" in vars(type(model).__mro__[2])
    assert made["sample"] == (0 if own else 4), "BLOOM of older transformers makes its own inputs"


def test_all_rows_end_early(made: Counter[str]) -> None:
    """One step is made in vain, and leaves no trace: the next call is as on the first day."""
    model = optimized("llama")
    free, _ = both(model, input_ids=token_ids(1, LENGTH), attention_mask=None)
    new = free[0, LENGTH:].tolist()
    for last in (0, 1, 4, TOKENS - 2, TOKENS - 1):
        count = new.index(new[last]) + 1
        made.clear()
        given = {"input_ids": token_ids(1, LENGTH), "attention_mask": None, "eos_token_id": new[last]}
        found, wanted = both(model, **given)
        assert torch.equal(found, wanted)
        assert found.shape[1] == LENGTH + count
        assert made["static_step"] == (count - 1) + min(count, TOKENS - 1)


@pytest.mark.parametrize("last", [119, 118, 117])
def test_nothing_is_written_behind_the_cache(
    last: int, made: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache of 128 positions that the call fills to the last one, and sequences that end just before."""
    model = optimized("llama", max_position_embeddings=256)
    places: list[int] = []
    original = graphs.static_step

    def watched(forward: Any, cache: Any, *more: Any) -> Any:
        places.append(int(cache.get_seq_length()))
        assert cache.layers[0].keys.shape[2] == 128
        return original(forward, cache, *more)

    monkeypatch.setattr(graphs, "static_step", watched)
    stops = [StopsAt(LENGTH + last + 1)]
    found, wanted = both(model, lambda: {"stopping_criteria": stops}, max_new_tokens=120)
    assert torch.equal(found, wanted)
    assert found.shape == (3, LENGTH + last + 1)
    assert max(places) == min(LENGTH + last, 127)


class StopsAt(StoppingCriteria):
    """Of the user's: keeps what it has seen, and reads it on the host."""

    def __init__(self, length: int) -> None:
        self.length, self.seen = length, []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.seen.append(input_ids[:, -1].tolist())
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


class Counting(LogitsProcessor):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.shape[1])
        scores[:, self.seen[-1]] += 1  # in place, as some do
        return scores


class Told(BaseStreamer):
    def __init__(self) -> None:
        self.texts: list[Any] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.device.type == "cpu"
        self.texts.append(value)

    def end(self) -> None:
        self.texts.append(None)


@pytest.mark.parametrize("sampled", [False, True])
def test_what_the_user_gives_is_called_as_before(sampled: bool, made: Counter[str]) -> None:
    """Criteria, processors and streamers: as often, in the same order, with the same values."""
    model, calls = optimized("gpt2"), []

    def make() -> dict[str, Any]:
        calls.append((StopsAt(LENGTH + 7), Counting(), Told()))
        criteria, processor, streamer = calls[-1]
        return {"stopping_criteria": [criteria], "logits_processor": [processor], "streamer": streamer}

    assert torch.equal(*both(model, make, do_sample=sampled, input_ids=token_ids(1, 9), attention_mask=None))
    assert torch.equal(*both(model, make, do_sample=sampled, input_ids=token_ids(1, 9), attention_mask=None))
    mine, theirs = calls[:2]
    assert mine[0].seen == theirs[0].seen
    assert mine[1].seen == theirs[1].seen == list(range(9, 16))
    texts = [[None if x is None else x.tolist() for x in each[2].texts] for each in calls]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 1 + 7 + 1
    assert made["sample"] == 2


def test_stop_strings_and_time(tmp_path: Path, made: Counter[str]) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), optimized("llama")
    banned = {"suppress_tokens": list(range(len(tokenizer), 160))}
    free, _ = both(model, **banned)
    text = tokenizer.decode(free[0, LENGTH + 3 : LENGTH + 5])
    for more in ({}, {"eos_token_id": ends(free, 9, 1, 2)}):
        given = {"stop_strings": [text], "tokenizer": tokenizer, **banned, **more}
        assert torch.equal(*both(model, **given))
        alone = {"input_ids": free[:1, :LENGTH], "attention_mask": None}
        found, wanted = both(model, **given, **alone)
        assert torch.equal(found, wanted)
        assert found.shape[1] <= LENGTH + 5
    found, wanted = both(model, max_time=0.0)
    assert torch.equal(found, wanted)
    assert found.shape[1] == LENGTH + 1
    assert made["sample"] == 6


@pytest.mark.parametrize(
    "more",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(range(80))},
        {"do_sample": True, "num_return_sequences": 2, "top_p": 0.7},
        {"max_new_tokens": 1},
        {"eos_token_id": 7, "max_length": 60, "max_new_tokens": None},
    ],
    ids=lambda more: next(iter(more)),
)
def test_options(more: dict[str, Any], made: Counter[str]) -> None:
    model = optimized("llama")
    assert torch.equal(*both(model, **more))
    assert made["sample"] == 1


def test_more_positions_than_the_model_has(made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The criterion that reminds of it is asked."""
    said: list[str] = []
    monkeypatch.setattr(
        "transformers.generation.stopping_criteria.logger.warning_once", lambda text: said.append(text)
    )
    assert torch.equal(*both(optimized("llama", max_position_embeddings=14)))
    assert made["sample"] == 1
    assert len(said) == 2 * (TOKENS - 6)


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
def test_on_zqs_attention(kv: str | None, steps: list[Any], made: Counter[str]) -> None:
    """And on torch's, where a mask has holes."""
    model, _ = stepping("qwen3", W4A16)
    zq.optimize(model, kv=kv)
    free, wanted = both(model)
    assert torch.equal(free, wanted)
    assert torch.equal(*both(model, eos_token_id=ends(free, 1, 4, 6)))
    assert all(own for own, _ in steps)
    holes = padded(3, LENGTH)["attention_mask"]
    holes[0, 4] = 0
    steps.clear()
    assert torch.equal(*both(model, attention_mask=holes))
    assert not any(own for own, _ in steps)
    assert len(steps) == (0 if kv else 2 * (TOKENS - 1))
    assert made["sample"] == 3


def given_back(model: Any) -> Any:
    return model.generate(**padded(), max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda _: {"return_dict_in_generate": True, "output_scores": True},
        lambda model: {"past_key_values": StaticCache(model.config, max_cache_len=32)},
        lambda _: {"use_cache": False},
        lambda _: {"cache_implementation": "dynamic"},
        lambda _: {"prefill_chunk_size": 4},
        lambda _: {"synced_gpus": True},
    ],
    ids=["returned", "given", "none", "dynamic", "chunks", "synced"],
)
def test_what_is_unusual_runs_as_ever(make: Any, made: Counter[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.all_reduce", lambda *_, **__: None)
    model = optimized("llama")
    found, wanted = (getattr(x, "sequences", x) for x in both(model, lambda: make(model)))
    assert torch.equal(found, wanted)
    assert made["sample"] == 0


def test_a_cache_that_is_kept_is_whole(made: Counter[str]) -> None:
    """It has no position too many; while it is there, another call makes its own."""
    model = optimized("llama")
    first = given_back(model)
    name = model.zq_runner.cache_name
    assert int(first[name].get_seq_length()) == LENGTH + 1
    assert torch.equal(*both(model))
    assert int(first[name].get_seq_length()) == LENGTH + 1
    assert made["sample"] == 0
    del first
    assert torch.equal(*both(model))
    assert made["sample"] == 1


def test_a_model_with_inputs_of_its_own_keeps_its_loop(made: Counter[str]) -> None:
    model = optimized("llama")
    kind = type(model)
    prepared: list[int] = []

    class Own(kind):  # type: ignore[misc, valid-type]
        def prepare_inputs_for_generation(self, input_ids: Any, attention_mask: Any, **kwargs: Any) -> Any:
            prepared.append(1)
            return super().prepare_inputs_for_generation(input_ids, attention_mask=attention_mask, **kwargs)

    model.__class__ = Own
    assert torch.equal(*both(model))
    assert made["sample"] == 0
    assert len(prepared) == 2 * TOKENS


def test_a_model_whose_inputs_were_replaced_keeps_its_loop(made: Counter[str]) -> None:
    """On the model itself, as adapters do it."""
    model = optimized("llama")
    usual, prepared = model.prepare_inputs_for_generation, []

    @wraps(usual)
    def counted(*args: Any, **given: Any) -> Any:
        prepared.append(1)
        return usual(*args, **given)

    model.prepare_inputs_for_generation = counted
    assert torch.equal(*both(model))
    assert made["sample"] == 0
    assert len(prepared) == 2 * TOKENS


def test_a_limit_of_another_class_is_asked(made: Counter[str]) -> None:
    class Never(MaxLengthCriteria):
        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = optimized("llama")
    found = both(model, stopping_criteria=StoppingCriteriaList([Never(12)]))
    assert torch.equal(*found)
    assert found[0].shape[1] > 12


def test_the_host_asks_when_the_next_step_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags are read behind the launch of the step after theirs, and nothing else is."""
    model, log = optimized("llama"), []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if any(name in str(func) for name in ("_local_scalar_dense", "nonzero")):
                log.append("host")
            return func(*args, **(kwargs or {}))

    def logged(module: Any, name: str, word: str) -> None:
        original = getattr(module, name)

        def call(*args: Any) -> Any:
            log.append(word)
            return original(*args)

        monkeypatch.setattr(module, name, call)

    logged(graphs, "static_step", "step")
    logged(ahead.Mail, "send", "send")
    logged(ahead.Mail, "read", "read")
    with Reads():
        found = model.generate(**padded(), max_new_tokens=5, pad_token_id=0, eos_token_id=[1000])
    assert found.shape[1] == LENGTH + 5
    assert log[log.index("send") :] == ["send", "step", "read", "host"] * 4 + ["send", "read"]
