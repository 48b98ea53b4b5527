"""The whole script on a tiny model: rows, resumption, seeds, tables."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import accuracy
import pytest
import rows
import torch

from tests.letters import save_tokenizer
from tests.tiny import save_tiny

WORDS = ["rain", "night", "fell", "and", "the", "wind", "swept", "street", "lamp", "dark"]


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> Path:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)
    save_tokenizer(tmp_path / "model")
    draw = random.Random(0)
    for name in ("calibration", "one", "two"):
        (tmp_path / f"{name}.txt").write_text(" ".join(draw.choices(WORDS, k=800)))
    monkeypatch.setattr(rows, "LKD", [{"gptq": {}}, {"lkd": {"iterations": 4}}])
    return tmp_path


@pytest.fixture
def call(files: Path, monkeypatch):
    """Runs the script; the names of the rows that it measured, with their seeds."""

    def run(*words: str) -> list[tuple[str, int]]:
        measured = []
        real = accuracy.measure

        def noting(row, seed, *rest):
            measured.append((row.name, seed))
            return real(row, seed, *rest)

        arguments = ["accuracy.py", str(files / "model"), "--calibration", str(files / "calibration.txt")]
        arguments += ["--text", f"one={files / 'one.txt'}", "--text", f"two={files / 'two.txt'}"]
        arguments += ["--windows", "3", "--length", "32", "--samples", "24", "--generated", "8"]
        arguments += ["--commit", "abc", *words]
        with monkeypatch.context() as patch:
            patch.setattr(accuracy, "measure", noting)
            patch.setattr(sys, "argv", arguments)
            accuracy.main()
        return measured

    return run


def test_a_second_call_adds_what_is_missing(call, files: Path, monkeypatch):
    out = files / "r.json"
    asked = ("--out", str(out), "--on-calibration")
    assert call(*asked, "--only", "w3 g64 (rtn|gptq)$") == [
        ("methods w3 g64 rtn", 0),
        ("methods w3 g64 gptq", 0),
    ]
    first = json.loads(out.read_text())
    assert call(*asked, "--only", "w3 g64 (rtn|gptq|lkd)$", "--seeds", "0,1", "--seeded", "lkd$") == [
        ("methods w3 g64 lkd", 0),
        ("methods w3 g64 lkd", 1),
    ]
    document = json.loads(out.read_text())
    assert document["rows"][:2] == first["rows"]
    for row in document["rows"]:
        kls = [row["texts"][name]["kl"] for name in ("one", "two")]
        assert row["mean_kl"] == pytest.approx(sum(kls) / 2)  # the text that calibrated does not count
        assert set(row["texts"]) == {"one", "two", "calibration"}
        assert row["commit"] == "abc"
    rtn, gptq, one, two = document["rows"]
    assert rtn["calibration"] == {"source": "none"}
    assert gptq["calibration"]["windows"] == 24
    assert one["calibration"]["windows"] == 32
    assert one["mean_kl"] != two["mean_kl"]
    # The same recipe in another table is not measured again.
    assert call(*asked, "--ablation", "--scheme", "w3 g64", "--only", "g64 lkd$") == []
    copied = json.loads(out.read_text())["rows"][-1]
    assert copied["table"] == "ablation"
    assert copied["mean_kl"] == one["mean_kl"]
    # A row whose recipe changed is.
    monkeypatch.setattr(rows, "LKD", [{"gptq": {}}, {"lkd": {"iterations": 5}}])
    assert call(*asked, "--only", "w3 g64 (rtn|gptq|lkd)$") == [("methods w3 g64 lkd", 0)]
    assert len(json.loads(out.read_text())["rows"]) == 5


def test_the_same_figures_again(call, files: Path):
    for name in ("a", "b"):
        call("--out", str(files / name), "--only", "methods w2 g64 lkd$")
    found = [json.loads((files / name).read_text())["rows"][0] for name in ("a", "b")]
    assert found[0]["texts"] == found[1]["texts"]


def test_a_row_that_fails_does_not_stop_the_others(call, files: Path, capsys, monkeypatch):
    monkeypatch.setitem(rows.SCHEMES, "w2 g64", ("int2:g48", None))
    with pytest.raises(SystemExit, match="1 rows failed"):
        call("--out", str(files / "r.json"), "--only", "(w2|w3) g64 rtn$")
    assert "groups of 48" in capsys.readouterr().out
    assert [row["scheme"] for row in json.loads((files / "r.json").read_text())["rows"]] == ["w3 g64"]


def test_rows_that_calibrate_ask_for_a_text(call, files: Path):
    with pytest.raises(SystemExit, match="fewer --samples"):
        call("--samples", "120", "--only", "w3 g64 rtn$")
    with pytest.raises(SystemExit, match="need --calibration"):
        call("--calibration", "", "--only", "w3 g64 gptq$")


def test_a_row_on_other_tokens_is_refused(call, files: Path, monkeypatch):
    real = accuracy.setting

    def shifted(args):
        found = real(args)
        found.calibration = found.calibration.flip(0)
        return found

    monkeypatch.setattr(accuracy, "setting", shifted)
    with pytest.raises(SystemExit, match="other tokens"):
        call("--only", "w3 g64 gptq$")


def test_show_prints_recipes_that_can_be_pasted(call, files: Path, capsys):
    from zq.recipe import Recipe

    call("--show", "--only", "w4a8 g64 lkd$")
    text = capsys.readouterr().out
    recipe = Recipe.parse(text)
    assert [step.name for step in recipe.steps] == ["gptq", "lkd"]
    assert recipe.calibration.generated == 8


def figures(path: Path) -> dict:
    return {(r["method"], r["seed"]): r["texts"] for r in json.loads(path.read_text())["rows"]}


def test_several_processes_give_the_same_rows_and_the_same_command_continues(call, files: Path):
    wanted = files / "list.txt"
    wanted.write_text("# short ones first\n0 methods w3 g64 (rtn|gptq)$\n0,1 ablation w3 g64 lkd$\n")
    options = ("--rows", str(wanted), "--out")
    call(*options, str(files / "alone.json"))
    call(*options, str(files / "many.json"), "--devices", "cpu,cpu", "--minutes", "5")
    assert figures(files / "many.json") == figures(files / "alone.json")
    for row in json.loads((files / "many.json").read_text())["rows"]:
        assert row["beside"] == 1
        assert row["commit"] == "abc"
    before = (files / "many.json").stat().st_mtime_ns
    call(*options, str(files / "many.json"), "--devices", "cpu,cpu")
    assert (files / "many.json").stat().st_mtime_ns == before


def test_what_is_not_finished_in_time_is_dropped(call, files: Path, capsys):
    out = str(files / "r.json")
    call("--only", "w3 g64 (rtn|gptq)$", "--out", out, "--devices", "cpu,cpu", "--minutes", "0.001")
    assert "stopped after 0 s" in capsys.readouterr().out
    assert not (files / "r.json").exists()


def test_a_list_that_names_nothing_is_refused(call, files: Path):
    (files / "list.txt").write_text("0 methods w5")
    with pytest.raises(SystemExit, match="no row is named like 'methods w5'"):
        call("--rows", str(files / "list.txt"))


def test_rows_that_share_written_windows_are_what_they_are_alone(call, files: Path):
    call("--out", str(files / "a"), "--only", "methods w[23] g64 lkd$", "--seeds", "0,1")
    for scheme in ("w2", "w3"):
        call("--out", str(files / scheme), "--only", f"methods {scheme} g64 lkd$", "--seeds", "1")
    together = json.loads((files / "a").read_text())["rows"]
    for scheme in ("w2", "w3"):
        (alone,) = json.loads((files / scheme).read_text())["rows"]
        same = next(r for r in together if r["scheme"].startswith(scheme) and r["seed"] == 1)
        assert same["texts"] == alone["texts"]
        assert same["calibration"]["generated"] == alone["calibration"]["generated"]
        assert same["seconds_of"]["windows"] > 0


def test_merging_takes_the_newer_rows(call, files: Path):
    old, new = files / "old.json", files / "new.json"
    call("--out", str(old), "--only", "w3 g64 (rtn|gptq)$")
    call("--out", str(new), "--only", "w[23] g64 gptq$", "--commit", "def")
    call("--merge", str(new), "--out", str(old))
    found = {(r["scheme"], r["method"]): r["commit"] for r in json.loads(old.read_text())["rows"]}
    assert found == {("w3 g64", "rtn"): "abc", ("w3 g64", "gptq"): "def", ("w2 g64", "gptq"): "def"}
    call("--out", str(files / "other.json"), "--only", "w3 g64 rtn$", "--windows", "2")
    with pytest.raises(SystemExit, match="another --out"):
        call("--merge", str(files / "other.json"), "--out", str(old))
    with pytest.raises(SystemExit, match="needs --out"):
        call("--merge", str(new))
