"""The benchmark of optimizer steps runs without a GPU and says what it measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import optim_speed
import pytest
import torch
from optim_speed import decoder, main, makers, prepared, tensors
from pages import refreshed

from zq.optim import AdamW


def run(monkeypatch: pytest.MonkeyPatch, *options: str) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(optim_speed, "SECONDS", 1e-4)
    monkeypatch.setattr(sys, "argv", ["optim_speed.py", "--device", "cpu", "--small", *options])
    main(said.append)
    return said


def test_it_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "speed.json"
    said = run(monkeypatch, "--out", str(out), "--commit", "abc")
    run(monkeypatch, "--out", str(out), "--commit", "abc", "--block")
    document = json.loads(out.read_text())
    speeds = [row for row in document["rows"] if row["table"] == "optim-speed"]
    assert len(speeds) == 2 * 2 * len(makers(False)) == 24
    assert {row["unfused"].get("fused=False", 0) > 0 for row in speeds} == {True, False}
    assert all(row["us"] >= row["host_us"] > 0 for row in speeds)
    found = {(row["scheme"], row["method"]): row for row in speeds}
    wide = found["96 x 96, bfloat16", "zq unfused, 32 bit"]
    assert wide["state_bytes"] == 8 * 96 * 96
    assert wide["moved_bytes"] == (3 * 2 + 2 * 8) * 96 * 96
    assert found["96 x 96, float32", "torch fused, 32 bit"]["state_bytes"] == 8 * 96 * 96
    assert found["96 x 96, float32", "zq unfused, 8 bit"]["state_bytes"] == 2 * (96 * 96 + 4 * 36)
    assert "| 96 x 96, float32 | zq unfused, 8 bit | " in said[-1]
    page = f"<!-- table: {out.name} optim-block -->\n<!-- end -->"
    assert "| zq unfused, 4 bit, B128 | 0 M | 0 MB | – | – |" in refreshed(page, tmp_path)


def test_one_dtype_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the places of the rows that are there, which otherwise stay."""
    out = tmp_path / "speed.json"
    only = ("--only", "^small decoder, bfloat16, (?!zq unfused, [48])", "--out", str(out), "--commit")
    for commit, more in (("abc", ()), ("def", ()), ("ghi", ("--again",))):
        run(monkeypatch, *only, commit, *more)
        rows = json.loads(out.read_text())["rows"]
        assert {row["commit"] for row in rows} == {"ghi" if more else "abc"}
        assert [row["method"] for row in rows] == ["torch fused, 32 bit", "zq unfused, 32 bit"]


def test_the_decoder_is_gpt2() -> None:
    assert sum(torch.Size(shape).numel() for shape in decoder(50257, 1024, 768, 12)) == 124_439_808


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_all_of_a_state_is_counted(bits: int) -> None:
    params = prepared([(90, 80), (7,)], torch.bfloat16, "cpu")
    optimizer = AdamW(params, bits=bits)
    optimizer.step()
    assert sum(t.nbytes for t in tensors(optimizer.state)) == optimizer.state_bytes
