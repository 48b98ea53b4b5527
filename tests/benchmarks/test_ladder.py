"""A ladder is a family: the same tokens for every size, checkpoints that `zq sweep` takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import ladder
import pytest
import torch
from transformers import AutoTokenizer

import zq
from tests.command import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("ladder")
    make(out)
    return out


def make(out: Path, *more: str) -> None:
    before = sys.argv
    sys.argv = ["ladder.py", str(out), "--text", "bundled", "--tiny", "--steps", "40", "--batch", "4"]
    sys.argv += ["--every", "15"]
    sys.argv += ["--length", "48", *more]
    try:
        ladder.main()
    finally:
        sys.argv = before


def test_a_token_is_a_byte():
    made = ladder.tokenizer()
    text = "Grüße aus Köln,\n\t 12 345 \u2028 日本"
    ids = made(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert min(ids) >= 2
    assert made.decode(ids) == text
    assert len(made) == 258


def test_the_sizes_are_those_of_their_names():
    for name, size in ladder.SIZES.items():
        with torch.device("meta"):
            model = ladder.LlamaForCausalLM(ladder.config(size, 512, 258))
        millions = sum(p.numel() for p in model.parameters()) / 1e6
        assert round(millions) == int(name[:-1])
        assert size.width % size.heads == 0


def test_what_is_held_out_is_the_end_of_each_text():
    parts = ladder.split(["aaaaaabc", 12 * "d" + "eeff"], 0.25)
    assert parts == ("aaaaaa\n\n" + 12 * "d", "b\n\nee", "c\n\nff")


def test_batches_depend_on_seed_and_step_only():
    ids = torch.arange(1000)
    first = ladder.windows(ids, 4, 10, 0, 3)
    assert first.shape == (4, 11)
    assert torch.equal(first[:, 1:], first[:, :-1] + 1)
    assert torch.equal(first, ladder.windows(ids, 4, 10, 0, 3))
    assert not torch.equal(first, ladder.windows(ids, 4, 10, 0, 4))
    assert not torch.equal(first, ladder.windows(ids, 4, 10, 1, 3))


def test_the_rate_rises_and_falls():
    found = [ladder.rate(step, 500, 1.0) for step in range(500)]
    assert found.index(max(found)) in (9, 10)
    assert max(found) == pytest.approx(1.0)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_it_learns_and_is_saved(trained):
    facts = {name: json.loads((trained / f"{name}.json").read_text()) for name in ladder.TINY}
    for name in ladder.TINY:
        assert facts[name]["held_out_loss"] < 4.5, "no better than log(258) = 5.55"
        assert set(facts[name]["course"]) == {"15", "30", "40"}
        model = zq.load(trained / name)
        assert model.dtype == torch.bfloat16
        assert sum(p.numel() for p in model.parameters()) == facts[name]["parameters"]
        assert len(AutoTokenizer.from_pretrained(trained / name)) == 258
    assert facts["a"]["tokens"] == facts["b"]["tokens"] == 40 * 4 * 48


def test_it_is_trained_once_and_only_with_the_same_options(trained, capsys):
    before = (trained / "a" / "model.safetensors").stat().st_mtime_ns
    make(trained)
    assert "a is there already" in capsys.readouterr().out
    assert (trained / "a" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="trained with other options"):
        make(trained, "--seed", "1")


def test_the_same_weights_each_time(trained, tmp_path):
    make(tmp_path)
    for name in ladder.TINY:
        files = [folder / name / "model.safetensors" for folder in (trained, tmp_path)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_sizes_in_processes_of_their_own(trained, tmp_path):
    make(tmp_path, "--devices", "cpu,cpu")
    for name in ladder.TINY:
        facts = [json.loads((folder / f"{name}.json").read_text()) for folder in (trained, tmp_path)]
        assert facts[0]["course"] == pytest.approx(facts[1]["course"], rel=1e-4)


def test_the_step_with_the_least_loss_is_kept(trained, tmp_path, monkeypatch):
    losses = iter([3.0, 2.0, 9.0, 1.5] * 2)
    monkeypatch.setattr(ladder, "held_out_loss", lambda *rest: next(losses))
    make(tmp_path)
    facts = json.loads((tmp_path / "a.json").read_text())
    assert facts["step"] == 30
    assert facts["held_out_loss"] == 1.5
    monkeypatch.undo()
    make(tmp_path / "short", "--steps", "40")
    last = (tmp_path / "short" / "a" / "model.safetensors").read_bytes()
    assert last == (trained / "a" / "model.safetensors").read_bytes()
    assert last != (tmp_path / "a" / "model.safetensors").read_bytes()


def test_a_sweep_takes_it(trained, tmp_path):
    options = ("--bits", "4", "--types", "int", "--blocks", "64", "--windows", "3", "--length", "48")
    command = ("sweep", trained / "a", trained / "b", *options, "--text", trained / "held-out.txt")
    found = run(*command, "-o", tmp_path / "out", "--devices", "cpu", "--json").ok().json
    assert len(found["cells"]) == 4
    perplexity = next(c for c in found["contests"] if c["metric"] == "ppl")
    assert perplexity["models"] == ["a", "b"]
