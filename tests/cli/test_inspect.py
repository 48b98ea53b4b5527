"""zq inspect: from headers only, the same figures as the run; --audit reads the bytes."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.cli.test_quantize import bits_on_disk, headers, nbytes
from tests.command import run

KEYS = {
    "folder",
    "model",
    "architecture",
    "quantization",
    "files",
    "parameters",
    "bytes",
    "schemes",
    "layers",
}


def test_an_original(llama):
    facts = run("inspect", llama, "--json").ok().json
    assert set(facts) == KEYS
    assert facts["folder"] == str(llama)
    assert (facts["model"], facts["architecture"]) == ("LlamaForCausalLM", "llama, decoder")
    assert (facts["quantization"], facts["files"], facts["schemes"]) == ("none", 1, {})
    entries = headers(llama)
    assert facts["parameters"] == sum(math.prod(entry["shape"]) for entry in entries.values())
    assert facts["bytes"] == sum(map(nbytes, entries.values()))
    assert len(facts["layers"]) == 15
    assert facts["layers"]["lm_head"] == {"shape": [160, 64], "scheme": "as stored", "bytes": 160 * 64 * 4}


def test_an_output(llama, w4a8):
    facts = run("inspect", w4a8, "--json").ok().json
    assert set(facts) == KEYS
    assert facts["quantization"] == "compressed-tensors"
    (scheme,) = facts["schemes"]
    assert scheme == "int4:g64 @ int8:token"
    entry = facts["schemes"][scheme]
    assert entry["layers"] == 14
    assert entry["bits"] == pytest.approx(bits_on_disk(w4a8, llama), rel=1e-12)
    report = json.loads((w4a8 / "zq_report.json").read_text())
    assert entry["bits"] == report["bits_per_weight"]
    assert facts["bytes"] == report["bytes_after"] == sum(map(nbytes, headers(w4a8).values()))


def test_the_table(w4a8):
    done = run("inspect", w4a8, "--layers").ok()
    said = " ".join(done.out.split())
    assert "int4:g64 @ int8:token 14 layers" in said
    assert "model.layers.1.mlp.down_proj 64x128 int4:g64 @ int8:token" in said
    assert "lm_head 160x64 as stored 41.0 kB" in said
    assert "audit" not in said


def test_a_narrow_terminal_loses_nothing(w4a8):
    done = run("inspect", w4a8, env={"COLUMNS": "40"}).ok()
    assert str(w4a8) in re.sub(r"\s", "", done.out)
    assert "…" not in done.out


def test_audit_passes(w4a8):
    count = len(headers(w4a8))
    assert run("inspect", w4a8, "--audit", "--json").ok().json["audit"] == {"passed": True, "tensors": count}
    assert f"passed: {count} tensors" in run("inspect", w4a8, "--audit").ok().out


@pytest.mark.parametrize("what", ["codes", "scale", "copied"])
def test_audit_sees_one_changed_bit(what, w4a8, tmp_path):
    folder = Path(shutil.copytree(w4a8, tmp_path / "copy"))
    name = {
        "codes": "model.layers.1.mlp.up_proj.weight_packed",
        "scale": "model.layers.0.self_attn.k_proj.weight_scale",
        "copied": "model.norm.weight",
    }[what]
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start + headers(folder)[name]["data_offsets"][0]] ^= 1
    path.write_bytes(data)
    run("inspect", folder).ok()  # the headers are fine
    done = run("inspect", folder, "--audit")
    assert done.code == 3
    assert f"'{name}'" in done.err


def test_an_encoder(bert):
    facts = run("inspect", bert, "--json").ok().json
    assert facts["architecture"] == "bert, encoder"
