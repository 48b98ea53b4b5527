"""zq doctor and --for: said before it is tried, with an exit code for scripts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command import run
from tests.letters import save_bpe, save_tokenizer
from tests.tiny import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("llama", folder, torch.bfloat16)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def w4a8(model: Path) -> Path:
    out = model.parent / "w4a8"
    run("quantize", model, "--w4a8", "--calib", "none", "-o", out).ok()
    return out


def test_every_engine_by_default(w4a8: Path) -> None:
    done = run("doctor", w4a8, "--json").ok().json
    assert list(done) == ["vllm:0.33:sm90", "sglang:0.5:sm90", "transformers:5", "llama.cpp"]
    assert [entry["loads"] for entry in done.values()] == [True, False, True, False]
    said = run("doctor", w4a8).ok().out
    assert "does not load: int4:g64 @ int8:token: SGLang has no dense kernel" in said


def test_an_engine_that_was_asked_for_decides_the_exit_code(w4a8: Path) -> None:
    assert run("doctor", w4a8, "--for", "transformers").code == 0
    assert run("doctor", w4a8, "--for", "transformers", "--for", "sglang").code == 2
    assert "engine 'tgi'" in run("doctor", w4a8, "--for", "tgi").err


def test_tensors_that_are_not_there(w4a8: Path, tmp_path: Path) -> None:
    """A checkpoint of another tool that holds INT4 as bytes, which no CUDA server loads."""
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((w4a8 / file).read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        tensors[name.replace("_packed", "")] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    done = run("doctor", tmp_path, "--for", "vllm")
    assert done.code == 2
    assert (
        "no engine loads it: config.json and the tensors do not agree: 14 tensors are missing, first"
        in done.out
    )
    done = run("doctor", tmp_path)
    assert done.code == 0
    assert done.out.count("are missing") == done.out.count("belong to no part") == 1, (
        "once, not for each engine"
    )
    for entry in run("doctor", tmp_path, "--json").json.values():
        assert not entry["loads"]
        assert ["are missing" in line for line in entry["problems"]].count(True) == 1


def test_a_float_checkpoint_is_refused(model: Path) -> None:
    done = run("doctor", model)
    assert done.code == 2
    assert "is not quantized, and zq doctor and zq serve take quantized checkpoints; make one" in done.err


def test_a_plan_is_checked_before_any_work(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", model, "--w4a8", "--calib", "none", "--for", "sglang", "-o", out)
    assert done.code == 2
    assert "--for sglang: int4:g64 @ int8:token: SGLang has no dense kernel" in done.err
    assert not out.exists()
    notes = (
        run("quantize", model, "--w8a8", "--calib", "none", "--for", "vllm:cpu", "--dry-run", "--json")
        .ok()
        .json["notes"]
    )
    assert "vllm:0.33:cpu runs int8:channel @ int8:token as INT8 (oneDNN)" in notes


def test_fused_layers_and_devices(model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "rules: [{match: '*.q_proj', weights: 'int8:channel'}, {match: '*', weights: 'int4:g32'}]\n"
    )
    options = ("--calib", "none", "--dry-run")
    done = run("quantize", model, "--recipe", recipe, *options, "--for", "vllm")
    assert done.code == 2
    assert "are fused into one layer and need one scheme, not int4:g32 and int8:channel" in done.err
    assert run("quantize", model, "--recipe", recipe, *options, "--for", "transformers").code == 0
    done = run("quantize", model, "--w4a16", "--group-size", "64", *options, "--for", "vllm:tp=4")
    assert "in groups of 64 cannot be split between 4 devices" in done.err
    whole = json.loads(run("quantize", model, "--w8a8", *options, "--for", "vllm:tp=2", "--json").ok().out)
    assert whole["format"] == "compressed-tensors"


def test_an_encoder_and_a_file_for_llama_cpp(model: Path, tmp_path: Path) -> None:
    encoder, recipe = tmp_path / "bert", tmp_path / "r.yaml"
    save_tiny("bert-model", encoder, torch.bfloat16)
    recipe.write_text(
        "rules: [{match: '*.query', weights: 'int8:channel'}, {match: '*', weights: 'int4:g32'}]\n"
    )
    run("quantize", encoder, "--recipe", recipe, "--calib", "none", "-o", tmp_path / "out").ok()
    done = run("doctor", tmp_path / "out", "--for", "vllm")
    assert "are fused into one layer" in done.out
    llama = tmp_path / "llama"
    save_tiny("llama", llama, torch.bfloat16)
    save_bpe(llama)
    run("quantize", llama, "--w4a16", "--calib", "none", "--to", "gguf", "-o", tmp_path / "g").ok()
    assert run("doctor", tmp_path / "g", "--for", "llama.cpp").code == 0
    (tmp_path / "g" / "model.gguf").write_bytes(b"")
    damaged = run("doctor", tmp_path / "g", "--for", "llama.cpp")
    assert damaged.code == 2
    assert "reads GGUF, not zq's own format\n  use zq export --to gguf" in damaged.out


def test_a_file_for_llama_cpp_beside_a_checkpoint_for_others(tmp_path: Path) -> None:
    """--to gguf leaves two things, and each engine is asked about the one that it would be given."""
    save_tiny("llama", tmp_path, torch.bfloat16)
    save_bpe(tmp_path)
    options = ("quantize", tmp_path, "--w4a16", "--calib", "none", "--to", "gguf", "--dry-run")
    both = run(*options, "--for", "llama.cpp", "--for", "transformers", "--for", "vllm:zq", "--json").ok()
    assert "llama.cpp runs int4:g64:s=fp16 as INT4 blocks, activations rounded to INT8" in both.json["notes"]
    refused = run(*options, "--for", "vllm")
    assert refused.code == 2
    assert "not zq's own format; install zq beside it (vllm:zq), or use --to compressed-te" in refused.err


def test_names_that_no_disk_takes(w4a8: Path, tmp_path: Path) -> None:
    done = run("export", w4a8, "--to", "gguf", "-o", tmp_path / ("x" * 300 + ".gguf"))
    assert done.code == 2
    assert "choose another -o" in done.err


KINDS = [
    ("llama", "int4:g32", "auto"),
    ("llama", "int4:g32", "zq"),
    ("llama", "int4:g32", "gptq"),
    ("llama", "int4:g32:asym", "gptq"),
    ("llama", "int4:g32:asym", "zq"),
    ("llama", "int4:g32:s=fp32", "zq"),
    ("llama", "int4:g48", "zq"),  # which divide no K of these models
    ("llama", "int3:g32", "gptq"),
    ("llama", "int4:b64", "auto"),
    ("llama", "int4:g32:two-level @ int8:token", "auto"),
    ("llama", "e4m3fn:128x128 @ e4m3fn:g128", "auto"),  # nor do these tiles
    ("llama", "e4m3fn:32x32 @ e4m3fn:g32", "zq"),
    ("llama", "int8:32x32", "auto"),
    ("gpt2", "int4:g32 @ int8:token", "auto"),
    ("bert-model", "int4:g32", "zq"),
]
TARGETS = ("vllm", "vllm:cpu", "vllm:zq", "vllm:tp=2", "sglang", "llama.cpp")


@pytest.mark.parametrize(("family", "rule", "format"), KINDS)
def test_what_is_advised_is_not_refused(family: str, rule: str, format: str, tmp_path: Path) -> None:
    """`zq export --to FORMAT` of the doctor converts this checkpoint into one that the engine loads; every
    other `--to FORMAT` that it or --for names is a plan that the engine loads."""
    model, out, recipe = tmp_path / "model", tmp_path / "out", tmp_path / "r.yaml"
    save_tiny(family, model, torch.bfloat16)
    (save_bpe if family == "llama" else save_tokenizer)(model)
    weights, _, activations = rule.partition(" @ ")
    more = f", activations: '{activations}'" * bool(activations)
    recipe.write_text(
        f"rules: [{{match: '*', weights: '{weights}'{more}}}]\nsteps: [rtn: {{}}]\n"
        f"calibration: {{source: none}}\nformat: {format}\n"
    )
    run("quantize", model, "--recipe", recipe, "-o", out).ok()
    options = [word for target in TARGETS for word in ("--for", target)]
    for number, (target, found) in enumerate(zip(TARGETS, asked(out, *options), strict=True)):
        for to in re.findall(r"zq export --to ([a-z-]+)", found["advice"]):
            name = tmp_path / f"new{number}{'.gguf' if to == 'gguf' else ''}"
            run("export", out, "--to", to, "-o", name).ok()
            assert to == "gguf" or asked(name, "--for", target)[0]["loads"]
        if found["problems"]:
            dry = ("quantize", model, "--recipe", recipe, "--dry-run", "--for", target)
            said = run(*dry).err + found["advice"].replace("zq export --to", "").partition("symmetric")[0]
            for to in re.findall(r"--to ([a-z-]+)", said):
                run(*dry, "--to", to).ok()


def asked(folder: Path, *options: str) -> list[dict[str, Any]]:
    """The doctor's answers, in order."""
    return list(run("doctor", folder, *options, "--json").json.values())


def test_what_helps_is_said(w4a8: Path, tmp_path: Path) -> None:
    said = run("doctor", w4a8, "--for", "llama.cpp").out
    assert "does not load: llama.cpp reads GGUF, not compressed-tensors" in said
    assert "as int4:g64 @ int8:token: GGUF files say nothing of activations" in said
    assert "--to" not in said
    native = tmp_path / "native"
    run("export", w4a8, "--to", "zq", "-o", native).ok()
    assert "use zq export --to compressed-tensors" in run("doctor", native, "--for", "vllm").out
    model = tmp_path / "model"
    save_tiny("llama", model, torch.bfloat16)
    save_bpe(model)
    done = run("quantize", model, "--w4a16", "--calib", "none", "--for", "llama.cpp", "--dry-run")
    assert done.err.strip() == (
        "error: --for llama.cpp: llama.cpp reads GGUF, not compressed-tensors; use --to gguf"
    )
