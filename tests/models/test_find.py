"""Choosing a description and a class; refusals are one line that says what to do."""

from __future__ import annotations

import json

import pytest
import transformers

from tests.tiny import TINY
from zq.errors import ZqError
from zq.models.families import FAMILIES
from zq.models.find import find_arch, load_config, model_class


@pytest.mark.parametrize("name", TINY)
def test_finds_arch_and_class(name):
    config = TINY[name]()
    assert find_arch(config, "here") is FAMILIES[config.model_type]
    assert model_class(config) is getattr(transformers, config.architectures[0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gpt2", "GPT2LMHeadModel"), ("bert", "BertModel"), ("qwen3", "Qwen3ForCausalLM")],
)
@pytest.mark.parametrize("architectures", [None, [], ["SomethingElse"], ["T5Model"]])
def test_class_without_usable_architectures(name, expected, architectures):
    config = TINY[name]()
    config.architectures = architectures
    assert model_class(config).__name__ == expected


def _refusal(config, where="model/config.json") -> str:
    with pytest.raises(ZqError) as caught:
        find_arch(config, where)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(where)
    return message


def test_unknown_type_lists_the_supported_ones():
    message = _refusal(transformers.T5Config())
    assert "'t5'" in message
    assert all(name in message for name in FAMILIES)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_quantized_model_is_refused(method):
    config = TINY["llama"]()
    config.quantization_config = {"quant_method": method}
    message = _refusal(config)
    assert method in message
    assert "start from the original" in message


def test_remote_code_is_refused():
    config = TINY["llama"]()
    config.architectures = ["MyOwnForCausalLM"]
    config.auto_map = {"AutoModelForCausalLM": "modeling_mine.MyOwnForCausalLM"}
    assert "auto_map" in _refusal(config)
    config.architectures = ["LlamaForCausalLM"]  # auto_map is harmless beside a known class
    assert find_arch(config, "here").model_type == "llama"


def _write(folder, content: str) -> None:
    (folder / "config.json").write_text(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type None is not supported"),
        ('{"model_type": "mamba"}', "model_type 'mamba' is not supported"),
        ('{"model_type": ["llama"]}', "is not supported"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "transformers rejects it"),
    ],
)
def test_bad_config_files(tmp_path, content, expected):
    _write(tmp_path, content)
    with pytest.raises(ZqError, match=r"config\.json") as caught:
        load_config(tmp_path)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_config(tmp_path):
    with pytest.raises(ZqError, match="cannot be read"):
        load_config(tmp_path)


def test_load_config_reads_what_was_saved(tmp_path):
    _write(tmp_path, json.dumps(TINY["opt-post"]().to_dict()))
    config = load_config(tmp_path)
    assert config.word_embed_proj_dim == 32
    assert config.do_layer_norm_before is False
