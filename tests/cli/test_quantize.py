"""zq quantize: what is written, what is said, and that both agree."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.command import run
from zq.cli.quantize import SHORTCUTS
from zq.recipe import Recipe

KEYS = {"zq", "torch", "command", "format", "recipe", "source_fingerprint", "bytes_before", "bytes_after"}
KEYS |= {
    "bits_per_weight",
    "weight_sqnr_db",
    "output_error",
    "held_out_loss",
    "training_loss",
    "changed",
    "smoothing",
    "seconds",
    "seconds_of",
    "notes",
    "calibration",
    "audit",
}
KEYS |= {"quantization_config", "output", "peak_memory", "seconds_total"}
SUFFIXES = ("", "_packed", "_scale", "_shape", "_zero_point", "_zero", "_sub")


def headers(folder: Path) -> dict[str, dict]:
    """Every tensor's header entry, read with nothing but the format's definition."""
    entries: dict[str, dict] = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries |= json.loads(data[8 : 8 + length])
    entries.pop("__metadata__", None)
    return entries


def nbytes(entry: dict) -> int:
    first, end = entry["data_offsets"]
    return end - first


def bits_on_disk(out: Path, source: Path) -> float:
    """Bits per weight of the quantized layers, from the headers of both folders only."""
    before, after = headers(source), headers(out)
    stored = weights = 0
    for name, entry in before.items():
        parts = [name + suffix for suffix in SUFFIXES]
        if f"{name}_scale" in after:
            stored += sum(nbytes(after[part]) for part in parts if part in after)
            weights += math.prod(entry["shape"])
    return 8 * stored / weights


def quantize(model: Path, out: Path, *args: str) -> dict:
    return run("quantize", model, "-o", out, "--calib", "random", "--json", *args).ok().json


@pytest.mark.parametrize("name", SHORTCUTS)
def test_every_shortcut(name, llama, tmp_path):
    out = tmp_path / "out"
    report = quantize(llama, out, f"--{name}")
    assert set(report) == KEYS
    tiles = name == "fp8-block"  # of 128, which do not divide the 64 inputs
    assert report["format"] == ("zq" if tiles else "compressed-tensors")
    assert report["output"] == str(out)
    assert Recipe.parse(report["recipe"]).name == name
    assert report["bits_per_weight"] == pytest.approx(bits_on_disk(out, llama), rel=1e-12)
    assert report["bytes_after"] == sum(map(nbytes, headers(out).values()))
    assert report["bytes_before"] == sum(map(nbytes, headers(llama).values()))
    assert report["audit"] == {"passed": True, "tensors": len(headers(out)), "quantized_layers": 14} | {
        "untouched_tensors": 7,
        "changed_tensors": 0,
    }
    assert report["command"] == f"zq quantize {llama} -o {out} --calib random --json --{name}"
    assert set(report["weight_sqnr_db"]) == {"attention", "mlp"}
    assert list(report["output_error"]) == ["0", "1"]
    assert report["peak_memory"] > 50e6
    inspected = run("inspect", out, "--json").ok().json
    quantized = [entry for entry in inspected["layers"].values() if entry["scheme"] != "as stored"]
    assert len(quantized) == 14


def test_effective_bits_count_scales(llama, tmp_path):
    # Groups of 32 of 4-bit codes with a float32 scale each: 5 bits, and 8 bytes of shape per layer.
    report = quantize(llama, tmp_path / "out", "--w4a16", "--group-size", "32")
    numel = sum(math.prod(e["shape"]) for name, e in headers(llama).items() if "_proj" in name)
    assert report["bits_per_weight"] == pytest.approx(5 + 14 * 2 * 8 * 8 / numel)


def test_what_people_see(llama, tmp_path):
    out = tmp_path / "out"
    done = run("quantize", llama, "--w4a8", "--calib", "random", "-o", out).ok()
    lines = done.err.splitlines()
    assert "group size 64: 128 does not divide 64, an input size of this model" in lines
    for block in ("model.layers.0", "model.layers.1"):
        (line,) = [line for line in lines if line.startswith(block)]
        assert "7 layers, worst" in line
        assert "output error" in line
        assert "ETA" in line
    said = " ".join(done.out.split())
    for part in ("compressed-tensors", "x smaller", "attention weights", "mlp weights", "dB", "audit passed"):
        assert part in said
    for part in ("time", "peak memory", f"zq eval {out} --against {llama}"):
        assert part in said
    assert (
        Path(out, "README.md").read_text().count(f"zq quantize {llama} --w4a8 --calib random -o {out}") == 1
    )


def test_names_are_no_markup(llama, tmp_path):
    done = run("quantize", llama, "--w8a16", "-o", tmp_path / "a[b]").ok()
    assert "a[b]" in "".join(done.out.split())
    assert "a[b]" in "".join(run("inspect", tmp_path / "a[b]").ok().out.split())


def test_what_is_written(llama, w4a8):
    assert {path.name for path in w4a8.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "README.md", "zq_report.json"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    assert (w4a8 / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    config = json.loads((w4a8 / "config.json").read_text())
    stored = config.pop("quantization_config")
    assert stored["quant_method"] == "compressed-tensors"
    assert config == json.loads((llama / "config.json").read_text())


def test_quiet_json_prints_nothing_else(llama, tmp_path):
    done = run("quantize", llama, "--w8a8", "--calib", "random", "-o", tmp_path / "out", "--json").ok()
    assert done.out.startswith("{")
    assert not [line for line in done.err.splitlines() if line.startswith("model.layers")]


def test_dry_run_writes_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in llama.iterdir()}
    narrow = {"COLUMNS": "40"}  # nothing may be shortened to fit
    done = run("quantize", llama, "--w4w8a8", "--dry-run", "-o", "OUT", env=narrow).ok()
    assert list(tmp_path.iterdir()) == []
    assert {path: path.stat().st_mtime_ns for path in llama.iterdir()} == before
    for name in headers(llama):
        assert name in done.out, f"the plan does not show {name}"
    said = " ".join(done.out.split())
    for part in ("int4:g64 @ int8:token", "int8:channel @ int8:token", "rule '@mlp'", "no rule names it"):
        assert part in said
    for part in ("of memory", "of disk and", "bits per quantized weight", "nothing was written"):
        assert part in said


def test_dry_run_json_is_what_the_run_then_does(llama, tmp_path):
    plan = run("quantize", llama, "--w4w8a8", "--calib", "random", "--dry-run", "--json").ok().json
    assert set(plan) == {"format", "notes", "tensors", "bytes_before", "bytes_after", "bits_per_weight"} | {
        *("memory", "disk", "seconds")
    }
    report = quantize(llama, tmp_path / "out", "--w4w8a8")
    for key in ("format", "notes", "bytes_before", "bytes_after", "bits_per_weight"):
        assert plan[key] == report[key]
    assert {row["name"] for row in plan["tensors"]} == set(headers(llama))
    after = headers(tmp_path / "out")
    for row in plan["tensors"]:
        assert set(row) == {"name", "shape", "becomes", "why", "bytes"}
        parts = [row["name"] + suffix for suffix in SUFFIXES]
        assert row["bytes"] == sum(nbytes(after[part]) for part in parts if part in after)
    assert plan["disk"] > plan["bytes_after"]  # and the streams that a job carries


def test_group_size(llama, tmp_path):
    quantize(llama, tmp_path / "out", "--w4a8", "--group-size", "32")
    after = headers(tmp_path / "out")
    assert after["model.layers.0.mlp.down_proj.weight_scale"]["shape"] == [64, 4]
    schemes = run("inspect", tmp_path / "out", "--json").ok().json["schemes"]
    assert list(schemes) == ["int4:g32 @ int8:token"]


def test_shard_size(llama, tmp_path):
    report = quantize(llama, tmp_path / "one", "--w8a8")
    quantize(llama, tmp_path / "many", "--w8a8", "--shard-size", "0.0001")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 1
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == report["bytes_after"]
    assert sorted(set(index["weight_map"].values())) == files
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert set(index["weight_map"]) == set(one)
    for file in files:
        held = load_file(tmp_path / "many" / file)
        assert sum(t.nbytes for t in held.values()) <= 100_000 or len(held) == 1
        for name, tensor in held.items():
            assert index["weight_map"][name] == file
            assert torch.equal(tensor, one[name])
    run("inspect", tmp_path / "many", "--audit").ok()


def test_seed_matters_only_to_what_is_random(llama, tmp_path):
    recipe = tmp_path / "stochastic.yaml"
    recipe.write_text(
        'rules:\n  - {match: "*", weights: "int4:g64"}\nsteps:\n  - rtn: {rounding: stochastic}\n'
    )

    def codes(name: str, *args: str) -> torch.Tensor:
        quantize(llama, tmp_path / name, *args)
        return load_file(tmp_path / name / "model.safetensors")["model.layers.1.mlp.up_proj.weight_packed"]

    first = codes("a", "--recipe", str(recipe), "--seed", "1")
    assert torch.equal(first, codes("b", "--recipe", str(recipe), "--seed", "1"))
    assert not torch.equal(first, codes("c", "--recipe", str(recipe), "--seed", "2"))
    assert torch.equal(codes("d", "--w4a16", "--seed", "1"), codes("e", "--w4a16", "--seed", "2"))


@pytest.mark.parametrize("source", ["bundled", "random", "none", "file"])
def test_calibration_sources(source, llama, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 100)
    name = str(text) if source == "file" else source
    done = run("quantize", llama, "--w8a8", "--calib", name, "-o", tmp_path / "out", "--json").ok()
    used = done.json["calibration"]
    assert used["source"] == name
    if source == "none":
        assert used == {"source": "none"}
        assert done.json["output_error"] == {}
    else:
        assert (used["windows"], used["length"], used["tokens"]) == (8, 64, 512)
        assert 0 < done.json["output_error"]["1"] < 0.05


def test_the_tokens_are_said(llama, tmp_path):
    asked = [
        "--w8a8",
        "--calib",
        "random",
        "--samples",
        "6",
        "--generated",
        "2",
        "--length",
        "32",
        "--seed",
        "5",
    ]
    done = run("quantize", llama, *asked, "-o", tmp_path / "out").ok()
    facts = json.loads((tmp_path / "out" / "zq_report.json").read_text())["calibration"]
    (line,) = [line for line in done.err.splitlines() if line.startswith("calibration: ")]
    said = f"8 windows of 32 tokens from random, 2 written by the model; 256 tokens, {facts['distinct']} dist"
    assert line.startswith(f"calibration: {said}inct ({facts['distinct'] / 160:.1%} of the vocabulary), the ")
    assert line.endswith("seed 5")
    assert (facts["vocabulary"], facts["seed"], facts["generated"]["windows"]) == (160, 5, 2)
    assert "calibration: " not in run("quantize", llama, *asked, "-o", tmp_path / "q", "--json").ok().err
    none = run("quantize", llama, "--w8a8", "--calib", "none", "-o", tmp_path / "n").ok()
    assert "calibration: " not in none.err


def test_a_published_training_shows_its_loss(llama, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text("rules: [{match: '*', weights: 'int4:g32'}]\nsteps: [lkd-classic: {iterations: 2}]\n")
    done = run("quantize", llama, "--recipe", recipe, "--calib", "random", "-o", tmp_path / "out").ok()
    lines = [line for line in done.err.splitlines() if line.startswith("model.layers")]
    assert len(lines) == 2
    assert all(re.search(r"  training loss \d\.\d\de-\d\d -> \d\.\d\de-\d\d  ", line) for line in lines)


def test_an_empty_folder_is_a_fine_output(llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    quantize(llama, out, "--w8a8")
    assert (out / "model.safetensors").is_file()


def test_the_native_format(llama, tmp_path):
    recipe = tmp_path / "native.yaml"
    recipe.write_text('rules:\n  - {match: "*", weights: "e2m1fn:b64:s=fp16"}\n')
    report = quantize(llama, tmp_path / "out", "--recipe", str(recipe))
    assert report["format"] == "zq"
    assert any("flat blocks" in note for note in report["notes"])
    assert report["bits_per_weight"] == pytest.approx(4 + 16 / 64)
    assert report["bits_per_weight"] == pytest.approx(bits_on_disk(tmp_path / "out", llama))


def test_an_encoder(bert, tmp_path):
    report = quantize(bert, tmp_path / "out", "--w4w8a8")
    assert report["audit"]["passed"]
    assert report["bits_per_weight"] == pytest.approx(bits_on_disk(tmp_path / "out", bert))


def test_bits_are_chosen_shown_kept_within_and_reported(llama, tmp_path):
    asked = ("--w4a16", "--calib", "random", "--bits", "5.5")
    plan = run("quantize", llama, *asked, "--dry-run", "--json").ok()
    assert list(tmp_path.iterdir()) == []
    rows = {row["name"]: row for row in plan.json["tensors"] if row["becomes"].startswith("int")}
    assert {row["becomes"] for row in rows.values()} == {"int4:g64", "int8:g64"}
    assert {row["why"].split(":")[0] for row in rows.values() if row["becomes"] == "int8:g64"} == {"bits 5.5"}
    report = quantize(llama, tmp_path / "out", "--w4a16", "--bits", "5.5")
    assert set(report) == KEYS | {"sensitivity"}
    assert plan.json["sensitivity"] == report["sensitivity"]
    assert plan.json["bits_per_weight"] == report["bits_per_weight"] <= 5.5
    assert report["bits_per_weight"] == pytest.approx(bits_on_disk(tmp_path / "out", llama), rel=1e-12)
    full = json.loads((tmp_path / "out" / "zq_report.json").read_text())
    assert {f"{name}.weight": layer["scheme"] for name, layer in full["layers"].items()} == {
        name: row["becomes"] for name, row in rows.items()
    }
    said = run("quantize", llama, *asked, "-o", tmp_path / "again").ok()
    assert said.err.count("sensitivity measured") == 2
    assert "bits 5.5: sites" in said.err
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()


def test_folded_scales_are_planned_said_and_reported(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rule = "rules: [{match: '*', weights: 'int4:g32'}]\n"
    steps = "steps: [{smoothquant: {}}, {awq: {windows: 2}}, {rtn: {}}]\n"
    Path("r.yaml").write_text(rule + steps)
    common = ("quantize", llama, "--recipe", "r.yaml", "--calib", "random")
    rows = run(*common, "--dry-run", "--json").ok().json["tensors"]
    planned = {row["name"] for row in rows if row["why"].endswith(", changed by smoothquant and awq")}
    assert planned == {
        f"model.layers.{i}.{norm}.weight"
        for i in range(2)
        for norm in ("input_layernorm", "post_attention_layernorm")
    }
    done = run(*common, "-o", "out").ok()
    for line in (line for line in done.err.splitlines() if line.startswith("model.layers")):
        assert re.search(r"  smoothquant 4 links, awq \d\.\d\de-\d\d -> \d\.\d\de-\d\d  ", line)
    report = json.loads(Path("out/zq_report.json").read_text())
    assert {name for names in report["changed"].values() for name in names} == planned
    assert [link["step"] for link in report["smoothing"]["1"]] == ["smoothquant"] * 4 + ["awq"] * 4


def test_the_next_command_calls_the_model_as_the_user_did(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zq.source.resolve", lambda model, progress: llama)
    done = run("quantize", "demo", "--w8a8", "--calib", "none", "-o", tmp_path / "out").ok()
    assert f"next: zq eval {tmp_path / 'out'} --against demo" in done.out
