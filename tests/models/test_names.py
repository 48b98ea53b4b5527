"""Checkpoint keys and module names; the rules are those that transformers applies when it loads."""

from __future__ import annotations

import pytest

from zq.models.names import extra, match


@pytest.mark.parametrize(
    ("name", "key", "prefix"),
    [
        ("model.layers.0.w.weight", "model.layers.0.w.weight", "model"),
        ("transformer.h.0.ln_1.weight", "h.0.ln_1.weight", "transformer"),
        ("encoder.layer.0.a.weight", "bert.encoder.layer.0.a.weight", "bert"),
        ("bert.embeddings.LayerNorm.weight", "bert.embeddings.LayerNorm.gamma", "bert"),
        ("embeddings.LayerNorm.bias", "bert.embeddings.LayerNorm.beta", "bert"),
        ("lm_head.weight", "embed_out.weight", "gpt_neox"),
        ("model.decoder.layers.0.fc1.bias", "decoder.layers.0.fc1.bias", "model"),
    ],
)
def test_spellings(name, key, prefix):
    assert match([name], {key}, prefix).found == {name: key}


def test_exact_key_wins():
    keys = ["h.0.w", "transformer.h.0.w"]
    found = match(["transformer.h.0.w"], keys, "transformer").found
    assert found == {"transformer.h.0.w": "transformer.h.0.w"}
    assert extra(found, keys) == ["h.0.w"]


def test_no_other_spelling_is_guessed():
    assert match(["model.layers.0.w"], {"layer.0.w", "decoder.layers.0.w"}, "model").missing


def test_all_misses_are_listed():
    wanted = [f"model.layers.{i}.w" for i in range(3)]
    assert match(wanted, {"model.layers.0.w"}, "model").missing == tuple(wanted[1:])
