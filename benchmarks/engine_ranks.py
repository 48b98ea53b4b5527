"""vLLM with zq's plug-in on two ranks of a CPU: python benchmarks/engine_ranks.py VENV/bin/python

A random Llama of one block, 4 heads and 2 heads of keys and values, in float32. Each rank rounds its part of
the inputs of a row-parallel layer with a scale of its own; so the answers must be ten times nearer to zq's
model that does the same than to the one with whole tokens, and to the one without rounding. Exits with 1 when
they are not.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from engines import OWN, answers, compare, forget_activations, plugin_site, torch_answer, vllm_server, zq_
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import zq
from zq.models.find import load_tokenizer
from zq.numerics.qtensor import fake_quantize_tokens
from zq.runtime.linear import QuantLinear
from zq.source import resolve

RANKS, LENGTH, VOCABULARY = 2, 60, 49152
SPLIT_INPUTS = ("o_proj", "down_proj")


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    load_tokenizer(resolve("demo", print)).save_pretrained(folder)


def by_parts(layer: QuantLinear, x: Tensor) -> Tensor:
    """A row-parallel layer as RANKS ranks compute it; x [..., K] -> [..., N]."""
    assert layer.scheme.activations is not None
    pairs = zip(x.chunk(RANKS, -1), layer.dense(x.dtype).chunk(RANKS, 1), strict=True)
    return torch.stack([fake_quantize_tokens(part, layer.scheme.activations) @ w.T for part, w in pairs]).sum(
        0
    )


def references(folder: Path, prompts: list[list[int]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    def ask() -> list[dict[str, Any]]:
        return [torch_answer(model, torch.tensor([ids])) for ids in prompts]

    model = zq.load(folder, dtype=torch.float32)
    yield "whole tokens", ask()
    real = QuantLinear.forward
    split = {m for name, m in model.named_modules() if name.endswith(SPLIT_INPUTS)}
    with mock.patch.object(
        QuantLinear, "forward", lambda layer, x: (by_parts if layer in split else real)(layer, x)
    ):
        yield "parts of tokens", ask()
    forget_activations(model)
    yield "no rounding", ask()


def main(python: str) -> None:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, VOCABULARY, (4, LENGTH), generator=generator).tolist()
    wrong = []
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        save_model(home / "model")
        recipe = home / "recipe.yaml"
        recipe.write_text(OWN)
        for name, how in (
            ("W4A8", ["--w4a8", "--calib", "none"]),
            ("W5A8 in zq's format", ["--recipe", recipe]),
        ):
            out = home / name.split()[0]
            zq_(["quantize", str(home / "model"), *map(str, how), "-o", str(out)])
            more = ["--tensor-parallel-size", str(RANKS)]
            site = plugin_site(python, home)
            with vllm_server(python, out, out.with_suffix(".log"), "float32", site, more) as address:
                said = answers(address, prompts)
            found = {key: compare(said, answer)["mean"] for key, answer in references(out, prompts)}
            print(json.dumps({"scheme": name, **found}), flush=True)
            if 10 * found.pop("parts of tokens") > min(found.values()):
                wrong.append(name)
    if wrong:
        raise SystemExit(f"two ranks differ: {', '.join(wrong)}")


if __name__ == "__main__":
    main(sys.argv[1])
