"""The cache of keys and values: what generate() gives with it, what it holds, what a measurement sees."""

from __future__ import annotations

import pytest
import torch
from transformers.cache_utils import DynamicCache, StaticLayer

from tests.kernels.inputs import BF16, FP8, normal
from tests.tiny import TINY, build_tiny, token_ids
from zq.errors import ZqError
from zq.eval.adapt import decoder_logits
from zq.kernels import reference
from zq.runtime import cache as kv_cache
from zq.runtime.cache import QuantizedStaticLayer, RoundedLayer, make_cache, quantize, rounding_cache

FAMILIES = [name for name in TINY if not name.startswith(("bert", "roberta"))]
CODES = {"int8": torch.int8, "fp8": FP8}


def generated(model, cache, ids, mask=None, tokens: int = 12):
    """(ids, logits of every new token [T, B, V]), greedy."""
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_with_16_bits_is_generate(name):
    """float32 here, so that another order of sums changes no token; rows of different length."""
    model = build_tiny(name)
    ids, mask = token_ids(2, 10), torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    wanted, logits = generated(model, DynamicCache(config=model.config), ids, mask)
    cache = make_cache(model.config, 2, 32, torch.float32)
    found, ours = generated(model, cache, ids, mask)
    assert torch.equal(found, wanted)
    assert torch.allclose(ours, logits, atol=2e-4)
    assert all(type(layer) is StaticLayer for layer in cache.layers)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt_neox", "mistral", "bloom"])
def test_generate_with_a_quantized_cache_is_near(name, kv):
    """Logits of the first token, in units of their spread: INT8 within 5 %, FP8 within 20 %. And all tokens
    are those of attention over rounded keys and values, but where sums in another order moved a code."""
    model = build_tiny(name)
    ids = token_ids(2, 10)
    _, logits = generated(model, DynamicCache(config=model.config), ids, tokens=1)
    cache = make_cache(model.config, 2, 32, torch.float32, kv)
    _, ours = generated(model, cache, ids, tokens=1)
    apart = ((ours - logits).abs().max() / logits.std()).item()
    assert 0 < apart < {"int8": 0.05, "fp8": 0.2}[kv], apart
    rounded, measured = generated(model, rounding_cache(model.config, kv), ids)
    found, ours = generated(model, make_cache(model.config, 2, 32, torch.float32, kv), ids)
    assert torch.equal(found, rounded)
    assert (ours - measured).abs().max() < 0.01 * logits.std()


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_codes_are_those_of_every_token_and_head(kv):
    layer = QuantizedStaticLayer(9, kv)
    keys, values = normal(2, 3, 5, 32, dtype=BF16), normal(2, 3, 5, 32, seed=1, dtype=BF16)
    for some in (slice(0, 3), slice(3, 4), slice(4, 5)):
        back, _ = layer.update(keys[:, :, some], values[:, :, some])
    assert int(layer.get_seq_length()) == 5
    for wide, codes, scale in (
        (keys, layer.keys, layer.key_scale),
        (values, layer.values, layer.value_scale),
    ):
        wanted, steps = reference.quantize(wide.reshape(-1, 32), CODES[kv])
        assert codes.dtype == CODES[kv]
        assert torch.equal(codes[:, :, :5].float(), wanted.view(wide.shape).float())
        assert torch.equal(scale[:, :, :5], steps.view(2, 3, 5))
    assert back.dtype == BF16
    assert torch.equal(back[:, :, :5], (layer.keys.float() * layer.key_scale[..., None]).to(BF16)[:, :, :5])
    assert (back[:, :, 5:] == 0).all()
    assert (back[:, :, :5] - keys).abs().max() < (0.02 if kv == "int8" else 0.13) * keys.abs().max()


def test_the_operators_read_what_the_layer_stores():
    """decode_attention on codes is attention on what update returns."""
    layer = QuantizedStaticLayer(12, "int8")
    for step in range(12):
        k, v = layer.update(*(normal(2, 2, 1, 32, seed=2 * step + s, dtype=BF16) for s in (0, 1)))
    q = normal(2, 4, 32, seed=99, dtype=BF16)
    first, last = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([11, 9], dtype=torch.int32)
    codes = (layer.keys, layer.values, layer.key_scale, layer.value_scale)
    found = torch.ops.zq.decode_attention(q, *codes, first, last, 0.2, None)
    wanted = torch.ops.zq.decode_attention(q, k, v, None, None, first, last, 0.2, None)
    assert torch.allclose(found.float(), wanted.float(), atol=0.02)


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_reset_reorder_and_crop_keep_the_memory(kv):
    layer = QuantizedStaticLayer(6, kv)
    x = normal(3, 2, 4, 16, dtype=BF16)
    before, _ = layer.update(x, x)
    places = [each.data_ptr() for each in layer.tensors()]
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    layer.crop(-1)
    assert int(layer.get_seq_length()) == 3
    after, _ = layer.update(x[:, :, 3:], x[:, :, 3:])
    assert torch.equal(after[:, :, :3], before[[2, 0, 0]][:, :, :3])
    assert torch.equal(after[:, :, 3], before[:, :, 3])
    layer.reset()
    assert int(layer.get_seq_length()) == 0
    assert not layer.keys.float().any()
    again, _ = layer.update(x, x)
    assert torch.equal(again, before)
    assert places == [each.data_ptr() for each in layer.tensors()]
    with pytest.raises(ZqError, match="cannot be cropped to 2 tokens"):
        layer.crop(2)


def test_beams():
    model = build_tiny("llama")
    ids = token_ids(2, 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(ids, **options)
    found = model.generate(ids, past_key_values=make_cache(model.config, 6, 16, torch.float32), **options)
    assert torch.equal(found, wanted)
    quantized = make_cache(model.config, 6, 16, torch.float32, "int8")
    rounded = rounding_cache(model.config, "int8")
    assert torch.equal(
        model.generate(ids, past_key_values=quantized, **options),
        model.generate(ids, past_key_values=rounded, **options),
    )


def test_memory():
    config = TINY["qwen3"]()  # two layers, two key-value heads of 32 channels
    values = 2 * 2 * (3 * 2 * 100 * 32)
    assert make_cache(config, 3, 100, BF16).nbytes == 2 * values
    for kv in ("int8", "fp8"):
        made = make_cache(config, 3, 100, BF16, kv)
        assert made.nbytes == values + 4 * values // 32
        assert made.layers[1].keys.dtype == CODES[kv]
        assert made.layers[1].key_scale.shape == (3, 2, 100)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_measurement_differs_by_the_rounding_alone(name, monkeypatch):
    """Without it the logits are those of a model without any cache, to the last bit."""
    model, ids = build_tiny(name, BF16), token_ids(2, 16)
    wanted = decoder_logits(model)(ids)
    assert not torch.equal(decoder_logits(model, "int8")(ids), wanted)
    monkeypatch.setattr(kv_cache, "rounded", lambda x, kv: x)
    assert torch.equal(decoder_logits(model, "int8")(ids), wanted)


def test_heads_of_any_size_can_be_measured():
    x = normal(1, 2, 3, 24)
    for kv in CODES:
        codes, scale = quantize(x, kv)
        wanted, steps = reference.quantize(x.view(-1, 24), CODES[kv])
        assert torch.equal(codes.view(-1, 24).float(), wanted.float())
        assert torch.equal(scale.view(-1), steps)
    layer = RoundedLayer("int8")
    assert layer.update(x, x)[0].shape == x.shape


def test_misuse():
    config = TINY["llama"]()
    with pytest.raises(ZqError, match="a cache of int4 is unknown; allowed: int8, fp8"):
        make_cache(config, 1, 8, BF16, "int4")
    with pytest.raises(ZqError, match="0 rows and 8 tokens"):
        make_cache(config, 0, 8, BF16)
    with pytest.raises(ZqError, match="bert model is an encoder"):
        make_cache(TINY["bert"](), 1, 8, BF16)
    with pytest.raises(ZqError, match="encoder"):
        rounding_cache(TINY["bert"](), "int8")
    config.head_dim = 24
    with pytest.raises(ZqError, match="heads have 24 channels, and a quantized cache needs a multiple of 16"):
        make_cache(config, 1, 8, BF16, "int8")
    assert make_cache(config, 1, 8, BF16).nbytes
