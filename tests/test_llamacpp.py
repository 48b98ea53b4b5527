"""A GGUF file, read back by transformers, is the quantized model; what it cannot be is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import zq
from tests.command import run
from tests.letters import save_bpe
from tests.tiny import save_tiny, token_ids
from zq.errors import AuditError, ZqError
from zq.export import ggml
from zq.llamacpp import ARCHS, PATTERNS, refuse, write
from zq.spec import Scheme

gguf = pytest.importorskip("gguf")


def model(folder: Path, name: str) -> Path:
    save_tiny(name, folder, torch.bfloat16)
    save_bpe(folder)
    return folder


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("rule", ["int4:g32", "int4:g32:asym", "int8:channel"])
def test_transformers_reads_the_same_model(name: str, rule: str, tmp_path: Path) -> None:
    source = model(tmp_path / "model", name)
    (tmp_path / "r.yaml").write_text(
        f"rules: [{{match: '*', weights: '{rule}'}}]\ncalibration: {{source: none}}\n"
    )
    out = tmp_path / "out"
    done = (
        run("quantize", source, "--recipe", tmp_path / "r.yaml", "--to", "gguf", "-o", out, "--json")
        .ok()
        .json
    )
    assert any("6 tokens back" in note for note in done["notes"]) == (name in ("mistral", "qwen2"))
    kind = {"int4:g32": "Q4_0", "int4:g32:asym": "Q4_1", "int8:channel": "Q8_0"}[rule]
    assert set(done["gguf"]["types"]) == {kind}
    ours = zq.load(out, dtype=torch.float32)
    config = AutoConfig.from_pretrained(source)  # transformers reads only a part of it from the file
    if name == "mistral":  # which is llama to llama.cpp, and no more than its window long here
        config = LlamaConfig(**config.to_dict() | {"model_type": "llama"})
    options = {"gguf_file": "model.gguf", "config": config, "dtype": torch.float32}
    theirs = AutoModelForCausalLM.from_pretrained(out, **options).eval()
    with torch.no_grad():
        a, b = (m(token_ids()[:, :6]).logits for m in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-5), float((a - b).abs().max())
    words = AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")
    assert words("abba cab").input_ids == AutoTokenizer.from_pretrained(source)("abba cab").input_ids


def test_export_of_a_checkpoint(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    out, file = tmp_path / "out", tmp_path / "x.gguf"
    run("quantize", source, "--w4a16", "--calib", "none", "--to", "gptq", "-o", out).ok()
    said = run("export", out, "--to", "gguf", "-o", file).ok().out
    assert "Q4_0" in said
    reader = gguf.GGUFReader(file)
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.0.attn_q.weight"} <= names
    assert reader.fields["general.architecture"].contents() == "llama"
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    for words, target in (
        ("exists; choose another name", file),
        ("give -o NAME.gguf", tmp_path / "folder"),
        ("there is no folder", tmp_path / "none" / "x.gguf"),
    ):
        failed = run("export", out, "--to", "gguf", "-o", target)
        assert failed.code == 2
        assert words in failed.err


@pytest.mark.parametrize(("dtype", "kind"), [(torch.float16, "F16"), (torch.bfloat16, "BF16")])
def test_what_is_not_quantized_stays_in_its_dtype(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    source, file = tmp_path / "model", tmp_path / "x.gguf"
    save_tiny("llama", source, dtype)
    save_bpe(source)
    done = run("export", source, "--to", "gguf", "-o", file, "--json").ok().json
    assert done["types"] == {kind: 2 * 7 + 1}
    reader = gguf.GGUFReader(file)
    assert {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1} == {kind}
    assert reader.fields["general.file_type"].contents() == {"F16": 1, "BF16": 32}[kind]
    config = AutoConfig.from_pretrained(source)
    options = {"gguf_file": file.name, "config": config, "dtype": torch.float32}
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, **options)
    with torch.no_grad():
        a, b = (m(token_ids()).logits for m in (ours, theirs))
    assert torch.allclose(a, b, atol=1e-5), float((a - b).abs().max())


def test_what_is_refused_before_any_work(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    failed = run("quantize", source, "--w4a8", "--calib", "none", "--to", "gguf", "-o", tmp_path / "out")
    assert failed.code == 2
    assert "gguf cannot hold 'model.layers.0.self_attn.q_proj'" in failed.err
    assert not (tmp_path / "out").exists()
    other = model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ZqError, match="no GGUF of gpt2 models; of: llama, mistral, qwen2, qwen3"):
        refuse({}, {}, other)
    config = json.loads((source / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZqError, match="linear position scaling"):
        refuse({}, {}, source)


def test_widths_that_no_block_holds_are_refused_before_they_are_measured(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: '*', weights: 'int4:g32'}]\nbits: {mean: 4, widths: [3, 4]}\n")
    asked = ("--recipe", recipe, "--calib", "random", "--to", "gguf", "-o", tmp_path / "out")
    failed = run("quantize", source, *asked)
    assert failed.code == 2
    assert "as int3:g32:s=fp16: llama.cpp has no int3 blocks" in failed.err
    assert "sensitivity measured" not in failed.err


def rewrite(folder: Path, **changes: object) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_tokenizers(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama")
    path = source / "tokenizer.json"
    data = json.loads(path.read_text())
    refuse({"x": Scheme.parse("int4:g32")}, {"x": (32, 32)}, source)
    for pattern, name in PATTERNS.items():
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        levels = {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False, "trim_offsets": False}
        rewrite(
            source,
            pre_tokenizer={"type": "Sequence", "pretokenizers": [split, levels]},
            model=data["model"] | {"ignore_merges": name == "llama-bpe"},
            normalizer={"type": "NFC"} if name == "qwen2" else None,
        )
        refuse({}, {}, source)
    plain = data["pre_tokenizer"]
    for changes in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": plain | {"add_prefix_space": True}},
        {"pre_tokenizer": plain | {"use_regex": False}},
        {"normalizer": {"type": "Lowercase"}},
        {"model": data["model"] | {"ignore_merges": True}},
    ):
        path.write_text(json.dumps(data))
        rewrite(source, **changes)
        with pytest.raises(ZqError, match="of a kind that zq cannot describe to"):
            refuse({}, {}, source)
    path.write_text(json.dumps(data))
    token = {"id": 5000, "content": "<far>", "special": True, "single_word": False}
    rewrite(
        source,
        added_tokens=[
            *data["added_tokens"],
            token | dict.fromkeys(("lstrip", "rstrip", "normalized"), False),
        ],
    )
    with pytest.raises(ZqError, match="has the token '<far>' with id 5000, and the model"):
        refuse({}, {}, source)
    path.unlink()
    with pytest.raises(ZqError, match="no readable tokenizer"):
        refuse({}, {}, source)
    assert set(ARCHS) == {"llama", "mistral", "qwen2", "qwen3"}


def test_a_head_of_its_own_stays_whatever_the_config_says(tmp_path: Path) -> None:
    source = model(tmp_path / "model", "llama-tied")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    run("quantize", source, "--w4a16", "--calib", "none", "--to", "gguf", "-o", out).ok()
    names = {tensor.name for tensor in gguf.GGUFReader(out / "model.gguf").tensors}
    assert "output.weight" in names


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--w4a16", "--group-size", "96"), "groups of 96 do not divide K=64"),
        (("--recipe", "r.yaml"), "llama.cpp has no int3 blocks"),
    ],
)
def test_what_would_fail_after_the_work_is_refused_before_it(
    options: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "model", "llama")
    Path("r.yaml").write_text("rules: [{match: '*', weights: 'int3:g32:asym'}]\n")
    done = run("quantize", "./model", *options, "--calib", "none", "--to", "gguf", "-o", "out")
    assert done.code == 2
    assert words in done.err
    assert not Path("out").exists()


def test_a_wrong_block_is_an_audit_error_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    source = model(tmp_path / "model", "llama")
    out = tmp_path / "out"
    run("quantize", source, "--w4a16", "--calib", "none", "--to", "gguf", "-o", out).ok()
    real = ggml.encode

    def wrong(q):
        kind, blocks = real(q)
        blocks[0, -1] ^= 1
        return kind, blocks

    monkeypatch.setattr(ggml, "encode", wrong)
    with pytest.raises(AuditError, match="has other values as Q4_0"):
        write(out, tmp_path / "x.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out"]
    monkeypatch.setattr(ggml, "encode", real)
    shutil.rmtree(source)
    assert write(out, tmp_path / "x.gguf")["bytes"] == (tmp_path / "x.gguf").stat().st_size
