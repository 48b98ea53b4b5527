"""Peers that calibrate on what the model writes get exactly what zq calibrates on."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import peers
import pytest
import torch

from tests.letters import save_tokenizer
from tests.tiny import save_tiny
from zq import pipeline
from zq.models.find import load_tokenizer
from zq.plan import make_plan
from zq.recipe import Recipe

WORDS = ["rain", "night", "fell", "and", "the", "wind", "swept", "street", "lamp", "dark"]


@pytest.fixture
def call(tmp_path: Path, monkeypatch):
    """Runs the script with an AutoRound that notes what it is asked for and changes nothing."""
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    save_tokenizer(tmp_path / "model")
    draw = random.Random(0)
    for name in ("calibration", "one"):
        (tmp_path / f"{name}.txt").write_text(" ".join(draw.choices(WORDS, k=800)))
    asked = []

    class AutoRound:
        def __init__(self, model, tokenizer, **options):
            asked.append(options)
            self.model = model

        def quantize(self):
            return self.model, None

    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=AutoRound))
    monkeypatch.setattr(peers, "versions", lambda: {"auto-round": "0"})

    def run(*words: str) -> list[dict]:
        asked.clear()
        arguments = ["peers.py", str(tmp_path / "model"), "--calibration", str(tmp_path / "calibration.txt")]
        arguments += ["--text", f"one={tmp_path / 'one.txt'}", "--windows", "3", "--length", "32"]
        arguments += ["--samples", "24", "--out", str(tmp_path / "r.json"), "--commit", "abc", *words]
        monkeypatch.setattr(sys, "argv", arguments)
        peers.main()
        return list(asked)

    return run


def test_written_windows_are_those_of_zq(call, tmp_path: Path, monkeypatch):
    plain, _, _ = call("--only", "AutoRound")
    assert plain["nsamples"] == len(plain["dataset"]) == 24
    mixed, *_ = call("--written", "--generated", "8")
    assert mixed["nsamples"] == len(mixed["dataset"]) == 32
    assert {k: v for k, v in mixed.items() if k not in ("dataset", "nsamples")} == {
        k: v for k, v in plain.items() if k not in ("dataset", "nsamples")
    }
    # What the pipeline runs through the first block, from the same tokens as text.
    seen = []
    real = pipeline.capture_inputs
    monkeypatch.setattr(
        pipeline, "capture_inputs", lambda s, batches: seen.extend(batches) or real(s, batches)
    )
    ids = torch.cat([window[0] for window in plain["dataset"]])
    (tmp_path / "cut.txt").write_text(load_tokenizer(tmp_path / "model").decode(ids))
    recipe = Recipe.parse(
        "rules: [{match: '*', weights: 'int4:g64'}]\nsteps: [gptq: {}]\n"
        f"calibration: {{source: '{tmp_path / 'cut.txt'}', samples: 24, length: 32, generated: 8}}\n"
    )
    pipeline.quantize(make_plan(tmp_path / "model", recipe), tmp_path / "out")
    assert torch.equal(torch.cat(seen), torch.cat(mixed["dataset"]))


def test_the_seconds_of_writing_are_added(call, tmp_path: Path):
    call("--written", "--generated", "8", "--only", "w3")
    (row,) = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert row["method"] == "AutoRound, 200 iterations, 8 written windows"
    assert row["seconds"] == pytest.approx(sum(row["seconds_of"].values()), abs=0.02)
    assert row["seconds_of"]["windows"] > 0


def test_only_autoround_has_such_rows():
    assert len(peers.rows(200)) == 9
    assert {row.package for row in peers.rows(200, 896)} == {"auto_round"}
