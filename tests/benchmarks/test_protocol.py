"""Exactly the tokens that the protocol names; results that survive an interruption and refuse to be mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from protocol import Cost, Results, exact_calibration, peak_rss

from tests.letters import save_tokenizer
from zq.data import BUNDLED, calibration_windows, load_text, tokenize
from zq.models.find import load_tokenizer

TEXT = "It was a dark and stormy night. The rain fell in torrents, except at occasional intervals. " * 20


@pytest.mark.parametrize(("samples", "length", "start"), [(5, 16, 0.02), (32, 32, 0.1), (1, 7, 0.5)])
def test_zq_takes_just_these_tokens_in_this_order(tmp_path: Path, samples, length, start):
    save_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    cut, ids = exact_calibration(TEXT, tokenizer, samples, length, start)
    direct = tokenize(TEXT[int(start * len(TEXT)) :], tokenizer)[: samples * length]
    assert ids.flatten().tolist() == direct
    file = tmp_path / "text.txt"
    file.write_text(cut, encoding="utf-8")
    for seed in range(3):
        assert torch.equal(calibration_windows(str(file), tokenizer, 1000, samples, length, seed), ids)


@pytest.mark.demo
def test_with_a_tokenizer_that_merges(demo_model: Path, tmp_path: Path):
    tokenizer = load_tokenizer(demo_model)
    for source in BUNDLED:
        cut, ids = exact_calibration(load_text(source), tokenizer, 8, 64, 0.02)
        file = tmp_path / "text.txt"
        file.write_text(cut, encoding="utf-8")
        assert torch.equal(calibration_windows(str(file), tokenizer, 1 << 20, 8, 64, 3), ids)


class LooksAhead:
    """One token per character, but the last of a text is another one: a slice has other tokens."""

    def __call__(self, text: str, **options: object) -> dict[str, list]:
        ids = [ord(c) for c in text[:-1]] + [1000]
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(text))]}


def test_a_slice_with_other_tokens_is_refused():
    with pytest.raises(SystemExit, match="not the tokens of their own text"):
        exact_calibration(TEXT, LooksAhead(), 4, 8, 0.0)


def test_a_short_text_is_refused(tmp_path: Path):
    save_tokenizer(tmp_path)
    with pytest.raises(SystemExit, match="are needed"):
        exact_calibration("short", load_tokenizer(tmp_path), 4, 8, 0.0)


def row(method: str, kl: float = 0.0, seed: int = 0) -> dict:
    return {"table": "methods", "scheme": "w8a8", "method": method, "seed": seed, "mean_kl": kl}


def test_every_row_is_on_disk_at_once_and_found_again(tmp_path: Path):
    path = tmp_path / "new" / "r.json"
    first = Results(path, {"device": "x"}, {"windows": 1})
    first.add(row("a", 1.0))
    assert json.loads(path.read_text())["rows"] == [row("a", 1.0)]
    again = Results(path, {"device": "x"}, {"windows": 1})
    assert again.find(method="a", seed=0) == row("a", 1.0)
    assert again.find(method="a", seed=1) is None
    again.add(row("b"))
    again.add(row("a", 2.0))  # measured anew: in the place of the old one
    assert json.loads(path.read_text())["rows"] == [row("a", 2.0), row("b")]


@pytest.mark.parametrize("other", [({"device": "y"}, {"windows": 1}), ({"device": "x"}, {"windows": 2})])
def test_results_of_another_kind_are_not_mixed(tmp_path: Path, other):
    path = tmp_path / "r.json"
    Results(path, {"device": "x"}, {"windows": 1}).add(row("a"))
    with pytest.raises(SystemExit, match="another --out"):
        Results(path, *other)


def test_the_peak_is_that_of_the_inside():
    with Cost("cpu") as small:
        pass
    if small.rss is None:
        pytest.skip("the peak cannot be reset here")
    with Cost("cpu") as large:
        torch.ones(50_000_000).sum()
    with Cost("cpu") as after:
        pass
    assert large.rss - small.rss > 150e6
    assert large.rss - after.rss > 150e6
    assert peak_rss() >= after.rss
    assert large.seconds > 0
    assert large.gpu is None
