"""zq generate: the tokens are those of transformers' own generate."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zq
from tests.command import run
from zq.runtime.cache import make_cache

PROMPT = "Hello there"


def greedy(model, folder, prompt: str, count: int) -> list[int]:
    """Argmax by argmax, without a cache, until the end-of-sequence token 2."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model.eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == 2:
                break
    return ids[0, start:].tolist()


def generate(*args) -> dict:
    return run("generate", *args, "--json").ok().json


def test_raw(llama):
    result = generate(llama, PROMPT, "--raw", "--max-tokens", "6")
    assert set(result) == {"prompt", "text", "tokens"}
    assert result["prompt"] == PROMPT
    assert result["tokens"] == greedy(AutoModelForCausalLM.from_pretrained(llama), llama, PROMPT, 6)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    assert result["text"] == tokenizer.decode(result["tokens"], skip_special_tokens=True)


def test_the_chat_template_is_used_when_there_is_one(llama):
    chat = generate(llama, PROMPT, "--max-tokens", "6")
    assert chat == generate(llama, PROMPT, "--max-tokens", "6", "--chat")
    tokenizer = AutoTokenizer.from_pretrained(llama)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    assert ids[0] == 1, "the template begins with <s>"
    assert ids[-1] == 2, "and ends with </s>"
    assert chat["tokens"] != generate(llama, PROMPT, "--max-tokens", "6", "--raw")["tokens"]


def test_it_streams_text(llama):
    done = run("generate", llama, PROMPT, "--raw", "--max-tokens", "6").ok()
    assert done.out.strip() == generate(llama, PROMPT, "--raw", "--max-tokens", "6")["text"].strip()


def test_a_quantized_checkpoint(w4a8):
    tokens = generate(w4a8, PROMPT, "--raw", "--max-tokens", "6")["tokens"]
    assert tokens == greedy(zq.load(w4a8), w4a8, PROMPT, 6)


def test_sampling_is_seeded(llama):
    def sample(seed: str) -> list[int]:
        return generate(llama, PROMPT, "--raw", "--temperature", "2", "--seed", seed, "--max-tokens", "8")[
            "tokens"
        ]

    assert sample("1") == sample("1")
    assert len({tuple(sample(seed)) for seed in "1234"}) > 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--max-tokens", "0"), "--max-tokens 0 is not allowed; give 1 or more"),
        (("--temperature", "nan"), "--temperature nan is not allowed; give 0 or more"),
        (("--seed", "-3"), "--seed -3 is not allowed"),
    ],
)
def test_bad_numbers(args, message, llama):
    done = run("generate", llama, PROMPT, *args)
    assert done.code == 2
    assert message in done.err


def test_what_was_fused_is_said_when_asked(w4a8):
    plain = run("generate", w4a8, PROMPT, "--raw", "--max-tokens", "2").ok()
    said = run("generate", w4a8, PROMPT, "--raw", "--max-tokens", "2", "--verbose").ok()
    assert said.out == plain.out
    assert "linears: 14 x dequantized weights" in said.err
    assert "linears" not in plain.err


@pytest.mark.parametrize("more", [(), ("--no-optimize",)])
def test_keys_and_values_in_8_bits(more, w4a8):
    """The tokens of the same model with such a cache, which are those of others now and then only."""
    model = zq.load(w4a8)
    tokenizer = AutoTokenizer.from_pretrained(w4a8)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    for kv in ("int8", "fp8"):
        cache = make_cache(model.config, 1, 64, model.dtype, kv)
        wanted = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found = generate(w4a8, PROMPT, "--raw", "--max-tokens", "6", "--kv", kv, *more)["tokens"]
        assert found == wanted[0, ids.shape[1] :].tolist()


def test_without_fusing_the_simulation_runs(w4a8, monkeypatch):
    from zq.runtime import optimize

    monkeypatch.setattr(optimize, "_optimize", None)
    tokens = generate(w4a8, PROMPT, "--raw", "--max-tokens", "6", "--no-optimize")["tokens"]
    assert tokens == greedy(zq.load(w4a8), w4a8, PROMPT, 6)
