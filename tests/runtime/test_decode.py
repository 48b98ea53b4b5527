"""Decode steps on zq's own attention and cache: what they compute, when, and in how many operators."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zq
from tests.runtime.quantized import W4A8, W4A16, W8A8, distance, force_kernels, in_float32, quantized
from tests.runtime.test_step import NoHost, padded
from tests.tiny import TINY, random_model, token_ids
from zq.runtime import graphs
from zq.runtime.blocks.around import Around
from zq.runtime.cache import make_cache

DECODERS = [name for name in TINY if "bert" not in name]
TOKENS = 6
LLAMA_LAYER = Counter(
    {
        "zq.add_rms_norm_quant": 2,
        "zq.w4a8_int8_group": 4,
        "zq.store_kv": 1,
        "zq.decode_attention": 1,
        "zq.quant_int8": 1,
        "zq.silu_mul_quant": 1,
    }
)
LLAMA_AROUND = Counter(
    {
        "aten.embedding": 1,
        "aten.copy_": 1,  # the present position
        "aten.index_select": 1,  # cosine and sine
        "aten.add": 1,  # of the last block
        "aten._fused_rms_norm": 1,
        "aten.mm": 1,  # the head
        "aten._foreach_add_": 1,  # lengths of all layers
    }
)


class Seen(TorchDispatchMode):
    """Counts operators that launch something, and fails where the host is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func.is_view or "view" in str(func)
        self.ops[str(func).rpartition(".")[0]] += not views
        return out


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, Counter[str]]]:
    """Of each static step that was made: whether attention was zq's own, and its operators."""
    force_kernels(monkeypatch)
    made: list[tuple[bool, Counter[str]]] = []
    original = graphs.static_step

    def watched(forward: Any, cache: Any, buffers: Any, *more: Any) -> Any:
        with NoHost(), Seen() as seen:
            out = original(forward, cache, buffers, *more)
        made.append((buffers.own, +seen.ops))
        return out

    monkeypatch.setattr(graphs, "static_step", watched)
    return made


def without_windows(name: str) -> Any:
    config = TINY[name]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def stepping(name: str, scheme: str = W4A8, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """(an optimized model that makes static steps, the same in float32, neither optimized nor stepping)"""
    config = without_windows(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = quantized(name, scheme, dtype, random_model(config, dtype))
    exact = in_float32(model)
    zq.optimize(model)
    model.zq_runner.on = True
    return model, exact


def generated(model: Any, tokens: int = TOKENS, **given: Any) -> tuple[Tensor, Tensor]:
    """(tokens, logits [T, B, V]) of greedy search"""
    out = model.generate(
        **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def forced(exact: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """Logits [T, B, V] of a model for the tokens that another one has chosen."""
    ones = torch.ones_like(sequences[:, mask.shape[1] :])
    whole = torch.cat((mask, ones), 1)
    places = (whole.cumsum(1) - 1).clamp_min(0)
    takes = {} if exact.config.model_type == "bloom" else {"position_ids": places}
    with torch.no_grad():
        logits = exact(input_ids=sequences, attention_mask=whole, **takes).logits
    return logits[:, mask.shape[1] - 1 : -1].transpose(0, 1)


def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on steps use torch's attention."""
    monkeypatch.setattr(Around, "fits", lambda *_: False)


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
        assert out.past_key_values.kv == kv
        places.add(out.past_key_values.layers[1].key_scale.data_ptr())
        del out
    assert len(places) == 1
    assert len(model.zq_runner.seen) == 2 * on, "one for the given cache, one for all others"
    zq.optimize(model)
    out = model.generate(**given, max_new_tokens=2, return_dict_in_generate=True, pad_token_id=0)
    assert getattr(out.past_key_values, "kv", None) is None


def test_a_llama_of_w4a8_in_ten_operators_a_layer(steps: list[Any]) -> None:
    """And seven around them, whatever the number of layers and rows."""
    counted = []
    for layers in (2, 5):
        model, _ = stepping("llama", W4A8, num_hidden_layers=layers)
        generated(model, 4, **padded())
        own, ops = steps[-1]
        assert own
        ops = fused_norm(ops)
        ops["zq.add_rms_norm_quant"] += ops.pop("zq.rms_norm_quant")  # the first has nothing to add
        counted.append(ops)
    assert {name: count // 3 for name, count in (counted[1] - counted[0]).items()} == LLAMA_LAYER
    assert sum(LLAMA_LAYER.values()) == 10
    for ops, layers in zip(counted, (2, 5), strict=True):
        assert ops - Counter({name: layers * count for name, count in LLAMA_LAYER.items()}) == LLAMA_AROUND


def fused_norm(ops: Counter[str]) -> Counter[str]:
    """torch has no kernel of rms_norm on a CPU and composes it; on CUDA it is one."""
    parts = ("aten._to_copy", "aten.mul", "aten.pow", "aten.mean", "aten.add_", "aten.rsqrt", "aten.rsqrt_")
    known = Counter({name: count for name, count in ops.items() if name not in parts})
    known["aten._fused_rms_norm"] = 1 if ops["aten.pow"] + ops["aten._fused_rms_norm"] == 1 else 99
    return known


@pytest.mark.parametrize(
    ("name", "layer", "around"),
    [
        ("llama", 10, 7),
        ("qwen3", 10, 7),
        ("gpt2", 10, 8),  # positions are embedded, too
        ("opt", 11, 9),  # ReLU has no operator; positions begin at 2
        ("gptj", 10, 7),
        ("gpt_neox", 11, 7),
        ("gpt_neox-serial", 10, 7),
        ("bloom", 10, 8),  # a norm of the embeddings
    ],
)
def test_operators_of_a_step(name: str, layer: int, around: int, steps: list[Any]) -> None:
    model, _ = stepping(name, W4A8)
    generated(model, 3, **padded())
    own, ops = steps[-1]
    if name in ("llama", "qwen3"):
        ops = fused_norm(ops)
    assert own
    assert sum(ops.values()) <= 2 * layer + around, ops


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


def test_post_norm_blocks_hand_over_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nine operators a block: each norm gives the next residual and its codes."""
    force_kernels(monkeypatch)
    counted = []
    for layers in (2, 4):
        config = TINY["bert-model"]()
        config.num_hidden_layers = layers
        model = zq.optimize(quantized("bert-model", W8A8, model=random_model(config, torch.bfloat16)))
        with torch.no_grad(), Seen() as seen:
            model(input_ids=token_ids())
        assert model.zq_runner.shared.handed is None
        counted.append(+seen.ops)
    more = counted[1] - counted[0]
    ours = {name: count // 2 for name, count in more.items() if name.startswith("zq.")}
    assert ours == {
        "zq.w8a8_int8": 4, "zq.quant_int8": 1, "zq.post_layer_norm_quant": 2, "zq.gelu_quant": 1
    }  # fmt: skip
    assert not any(name.startswith(("aten.add", "aten.native_layer_norm")) for name in more)


def test_rows_are_not_handed_to_other_hidden_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a hook puts in the place of a block's output is what the next block sees."""
    force_kernels(monkeypatch)
    model, ids = zq.optimize(quantized("bert-model", W8A8)), token_ids()
    with torch.no_grad():
        plain = model(input_ids=ids)[0]
        handle = model.encoder.layer[0].register_forward_hook(lambda *given: given[2] * 0)
        zeros = model(input_ids=ids)[0]
        handle.remove()
        again = model(input_ids=ids)[0]
    assert torch.equal(again, plain)
    assert distance(zeros, plain) > 0.3
    assert torch.equal(zeros[0], zeros[1])
