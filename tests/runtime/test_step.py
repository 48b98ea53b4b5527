"""Decode steps over static buffers are what the model computes without them, and ask the host nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import zq
from tests.runtime.quantized import W4A8, W8A8, distance, force_kernels, quantized
from tests.runtime.stepping import NoHost, padded
from tests.tiny import TINY, random_model, token_ids
from zq.runtime import graphs
from zq.runtime.pool import CachePool, bucket

DECODERS = [name for name in TINY if "bert" not in name]
SLIDING = ("mistral", "qwen2")  # as tests/tiny.py has them
ENCODERS = [name for name in TINY if "bert" in name]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of the static steps that were made; each is made under NoHost."""
    made: list[int] = []
    original = graphs.static_step

    def watched(forward: Any, cache: Any, buffers: Any, *more: Any) -> Any:
        made.append(buffers.ids.shape[0])
        with NoHost():
            return original(forward, cache, buffers, *more)

    monkeypatch.setattr(graphs, "static_step", watched)
    return made


def optimized(name: str, on: bool = True) -> Any:
    model = zq.optimize(quantized(name, W8A8, torch.float32))
    model.zq_runner.on = on
    return model


def generated(model: Any, on: bool, **given: Any) -> torch.Tensor:
    model.zq_runner.on = on
    torch.manual_seed(0)
    return model.generate(**given, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_several_times(name: str, steps: list[int]) -> None:
    """Other batches and lengths in a row, padded and not, greedy and sampled: the same tokens."""
    model = optimized(name)
    calls: list[dict[str, Any]] = [
        {**padded(), "max_new_tokens": 6},
        {"input_ids": token_ids(1, 5), "max_new_tokens": 7},
        {**padded(2, 12), "max_new_tokens": 4, "do_sample": True},
        {**padded(2, 7), "max_new_tokens": 3, "do_sample": True, "num_return_sequences": 2},
    ]
    for given in calls:
        wanted = generated(model, False, **given)
        assert torch.equal(generated(model, True, **given), wanted)
    assert steps == ([] if name in SLIDING else [3] * 5 + [1] * 6 + [2] * 3 + [4] * 2)


@pytest.mark.parametrize(
    "given",
    [
        {"num_beams": 2},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2},
        {"output_hidden_states": True, "return_dict_in_generate": True},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_unusual_runs_as_ever(given: dict[str, Any], steps: list[int]) -> None:
    model = optimized("llama")
    batch = token_ids(1 if "prompt_lookup_num_tokens" in given else 2, 6)
    found = [generated(model, on, input_ids=batch, max_new_tokens=5, **given) for on in (False, True)]
    texts = [each.sequences if given.get("return_dict_in_generate") else each for each in found]
    assert torch.equal(*texts)
    assert steps == []


@pytest.mark.parametrize("name", ["llama", "bert", "a block as it was"])
def test_hooks_on_a_block_see_its_output(name: str, steps: list[int]) -> None:
    """Of every prompt, step and text, as it would be without static steps."""
    if name == "a block as it was":
        name, some = "llama", lambda path: None if ".layers.0." in path else W8A8
        model = zq.optimize(quantized(name, some, torch.float32))
        assert model.zq_fused.left["block: no layer is quantized by zq"] == 1
    else:
        model = optimized(name)
    seen: list[Any] = []
    block, ids = model.zq_runner.blocks[0], token_ids(2, 6)
    hook = block.register_forward_hook(lambda *given: seen.append(given[-1]))
    for on in (True, False):
        if name == "llama":
            generated(model, on, input_ids=ids, max_new_tokens=4)
        else:
            model.zq_runner.on = on
            with torch.no_grad():
                model(input_ids=ids)
    outputs = [each[0] if isinstance(each, tuple) else each for each in seen]
    half = len(outputs) // 2
    assert half == (4 if name == "llama" else 1)
    assert all(distance(*each) < 1e-2 for each in zip(outputs[:half], outputs[half:], strict=True))
    assert steps == []
    assert not model.zq_runner.seen
    hook.remove()
    if name == "llama":
        generated(model, True, input_ids=ids, max_new_tokens=4)
        assert steps == [2] * 3


def test_a_cache_of_the_users_own(steps: list[int]) -> None:
    """A static one is written as transformers would, a dynamic one passes by; both go on afterwards."""
    model = optimized("llama")
    ids = token_ids(2, 8)
    for make in (DynamicCache, lambda: StaticCache(model.config, max_cache_len=32)):
        found = []
        for on in (False, True):
            cache = make()
            first = generated(model, on, input_ids=ids, max_new_tokens=4, past_key_values=cache)
            assert int(cache.get_seq_length()) == 11
            found.append(generated(model, on, input_ids=first, max_new_tokens=3, past_key_values=cache))
        assert torch.equal(*found)
    assert steps == [2] * (3 + 3), "the second call continues with one token"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "bloom", "gpt_neox", "opt-post"])
def test_token_by_token_through_the_operators(
    name: str, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of every step, bf16, against the model over a dynamic cache, whose rotations are rounded once
    less."""
    force_kernels(monkeypatch)
    model = zq.optimize(quantized(name, W4A8))
    given, found = padded(), []
    for on in (False, True):
        model.zq_runner.on = on
        out = model.generate(
            **given, max_new_tokens=6, min_new_tokens=6, output_logits=True, return_dict_in_generate=True,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        found.append((out.sequences, torch.stack(out.logits)))
    assert len(steps) == 5
    same = found[0][0].eq(found[1][0]).all()
    first = found[1][1] - found[0][1]
    assert float(first[:2].norm() / found[0][1][:2].norm()) < 3e-2, "before tokens can differ"
    assert not same or float(first.norm() / found[0][1].norm()) < 3e-2


def test_blocks_that_are_not_fused_count_their_own_tokens(steps: list[int]) -> None:
    model = quantized("llama", lambda name: None if ".0." in name else W8A8, torch.float32)
    model = zq.optimize(model)
    given = {**padded(), "max_new_tokens": 6}
    assert torch.equal(generated(model, True, **given), generated(model, False, **given))
    assert steps == [3] * 5


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    model, given = optimized(name), padded()
    ids, mask = given["input_ids"], given["attention_mask"].flip(1)
    with torch.no_grad():
        for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids}):
            model.zq_runner.on = False
            wanted = model(**inputs)
            model.zq_runner.on = True
            with NoHost():
                found = model(**inputs)
            assert found.keys() == wanted.keys()
            assert torch.equal(found[0][mask.bool()], wanted[0][mask.bool()])
    assert len(model.zq_runner.seen) == 2


@pytest.mark.parametrize("mixed", [False, True])
def test_an_encoder_without_a_mask_makes_none(mixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 makes one of [B, 1, S, S] while a graph is captured."""
    scheme = (lambda name: None if ".0." in name else W8A8) if mixed else W8A8
    model = zq.optimize(quantized("bert-model", scheme, torch.float32))
    model.zq_runner.on, masks = False, []
    original: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, q: Any, k: Any, v: Any, mask: Any, **more: Any) -> Any:
        masks.append(None if mask is None else mask.shape[2])
        return original(module, q, k, v, mask, **more)

    with torch.no_grad():
        wanted = model(input_ids=token_ids())[0]
        monkeypatch.setattr(
            "transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_, **__: False
        )
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
        model.zq_runner.on = True
        assert torch.equal(model(input_ids=token_ids())[0], wanted)
    assert masks == ([1, 1] if mixed else [None, None])


def test_in_inference_mode_and_out_of_it(steps: list[int]) -> None:
    model, given = optimized("llama"), {**padded(), "max_new_tokens": 4}
    with torch.inference_mode():
        first = generated(model, True, **given)
    assert torch.equal(generated(model, True, **given), first)
    assert steps == [3] * 6
    encoder = optimized("bert")
    for mode in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with mode():
            encoder(**padded())
    assert next(iter(encoder.zq_runner.seen.values())).calls == 3


def test_only_so_many_shapes_are_kept() -> None:
    model = optimized("bert")
    with torch.no_grad():
        for length in range(1, graphs.LIMIT + 6):
            model(input_ids=token_ids(1, length))
    lengths = [key[1][1][1] for key in model.zq_runner.seen]  # type: ignore[index]
    assert lengths == list(range(6, graphs.LIMIT + 6)), "the last ones"


def test_calls_that_learn_or_are_compiled_are_left_alone() -> None:
    model = optimized("bert")
    model(input_ids=token_ids())
    model.train()
    with torch.no_grad():
        model(input_ids=token_ids())
    assert not model.zq_runner.seen


def lease(pool: CachePool, batch: int, length: int) -> Any:
    return pool.lease(batch, length, torch.device("cpu"), torch.float32)


def test_caches_stay_where_they_are() -> None:
    pool = CachePool(TINY["llama"]())
    first = lease(pool, 2, 10)
    places = [layer.keys.data_ptr() for layer in first.layers]
    first.layers[1].values.fill_(float("nan"))
    first.layers[0].cumulative_length.add_(7)
    assert lease(pool, 1, 5) is None, "in use"
    del first
    second = lease(pool, 1, 130)
    assert [layer.keys.data_ptr() for layer in second.layers] == places
    assert tuple(second.layers[0].keys.shape) == (1, 2, 192, 16)
    assert int(second.get_seq_length()) == 0
    assert all(not layer.values.any() and not int(layer.cumulative_length) for layer in second.layers)
    del second
    third = lease(pool, 3, 129)
    assert tuple(third.layers[1].values.shape) == (3, 2, 192, 16)
    del third
    assert lease(pool, 6, 100).layers[0].keys.numel() > pool.held[0][1].numel() // 2


def test_lengths_that_share_a_graph() -> None:
    sizes = sorted({bucket(length) for length in range(1, 3000)})
    assert sizes == [128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072]
    assert all(bucket(length) >= length for length in range(1, 3000))


def test_a_cache_with_a_window_is_not_lent() -> None:
    assert lease(CachePool(TINY["mistral"]()), 1, 10) is None
    config = TINY["mistral"]()
    config.sliding_window = None
    assert lease(CachePool(config), 1, 10) is not None


def test_a_mistral_without_a_window_is_stepped(steps: list[int]) -> None:
    config = TINY["mistral"]()
    config.sliding_window = None
    model = zq.optimize(quantized("mistral", W8A8, torch.float32, random_model(config)))
    given = {**padded(), "max_new_tokens": 5}
    assert torch.equal(generated(model, True, **given), generated(model, False, **given))
    assert steps == [3] * 4
