"""Windows that the model writes itself: whole, seeded, and not ended by an end token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY, VOCAB, save_tiny
from zq.calibration import written_windows
from zq.checkpoint.reader import reader
from zq.data import BEGINNING, beginnings, mixed
from zq.errors import ZqError
from zq.models.sampling import PIECE, pieces, write_windows
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe

RECIPE = """
rules: [{match: '*', weights: 'int4:g32'}]
steps: [{gptq: {}}]
calibration: {source: SOURCE, samples: 6, length: 16, generated: 5}
"""
DECODERS = [name for name in TINY if "bert" not in name]


def _plan(folder: Path, source: str = "random"):
    return make_plan(folder, Recipe.parse(RECIPE.replace("SOURCE", source)))


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_writes_whole_windows_and_the_same_again(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    plan = _plan(tmp_path)
    begun = beginnings(torch.empty(0, 16, dtype=torch.int64), 5, VOCAB, 1, seed=3)
    windows = write_windows(plan.skeleton, reader(plan.index), begun, 16, seed=3)
    assert windows.shape == (5, 16)
    assert torch.equal(windows[:, :BEGINNING], begun)
    assert 0 <= int(windows.min()) <= int(windows.max()) < VOCAB
    assert torch.equal(windows, write_windows(plan.skeleton, reader(plan.index), begun, 16, seed=3))
    assert not torch.equal(windows, write_windows(plan.skeleton, reader(plan.index), begun, 16, seed=4))
    assert all(p.device.type == "meta" for p in plan.skeleton.model.parameters())


@pytest.mark.parametrize("family", DECODERS)
def test_the_tokens_follow_the_model(family: str, tmp_path: Path) -> None:
    """Each token is one of the TOP_K likeliest after those before it, which a shifted cache would break."""
    model = save_tiny(family, tmp_path)
    plan = _plan(tmp_path)
    windows = write_windows(plan.skeleton, reader(plan.index), torch.randint(VOCAB, (8, 4)), 32, seed=0)
    with torch.no_grad():
        logits = model(windows).logits[:, 3:-1]
    ranks = (logits > logits.gather(-1, windows[:, 4:, None])).sum(-1)
    assert int(ranks.max()) < 50


def test_an_end_token_ends_nothing(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path)
    with torch.no_grad():  # every token is as likely as any other
        model.lm_head.weight.zero_()
    model.config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    plan = _plan(tmp_path)
    windows = write_windows(plan.skeleton, reader(plan.index), torch.randint(VOCAB, (64, 4)), 64, seed=0)
    ended = (windows[:, 4:40] == 2).any(1)
    assert int(ended.sum()) > 5
    assert int((windows[ended, 40:] == 0).sum()) < windows[ended, 40:].numel() // 4


def test_pieces_fill_a_window() -> None:
    assert pieces(1024) == (4, PIECE)
    assert pieces(100) == (1, 100)
    for length in (1, 255, 300, 513, 4095):
        count, size = pieces(length)
        assert 0 <= count * size - length < count


def test_beginnings_are_random_and_from_the_text() -> None:
    text = torch.arange(100, 160).view(3, 20)
    begun = beginnings(text, 10, 50, 7, seed=0)
    assert bool((begun[::2, 0] == 7).all())
    assert int(begun[::2].max()) < 50
    assert bool((begun[1::2].diff(dim=1) == 1).all())
    assert bool((begun[1::2] >= 100).all())
    assert int(beginnings(text, 10, 50, None, seed=0)[::2].max()) < 50


def test_mixed_keeps_every_window() -> None:
    a, b = torch.arange(12).view(6, 2), torch.arange(100, 108).view(4, 2)
    both = mixed(a, b, seed=1)
    assert sorted(both[:, 0].tolist()) == sorted([*a[:, 0].tolist(), *b[:, 0].tolist()])
    assert not torch.equal(both, torch.cat([a, b]))


@pytest.mark.parametrize("source", ["random", "none"])
def test_a_run_reports_what_was_written(source: str, tmp_path: Path) -> None:
    save_tiny("llama-tied", tmp_path / "model")
    plan = _plan(tmp_path / "model", source)
    assert plan.tokens == (11 if source == "random" else 5) * 16
    assert any("written by the model itself" in note for note in plan.notes)
    report = quantize(plan, tmp_path / "out").report
    assert report["calibration"]["generated"]["windows"] == 5
    assert report["calibration"]["tokens"] == plan.tokens


def test_windows_that_were_written_before_are_taken(tmp_path: Path) -> None:
    """The same bytes as if they had been written then; windows that do not fit are refused."""
    save_tiny("llama-tied", tmp_path / "model")
    plan = _plan(tmp_path / "model")
    with torch.no_grad():
        written = written_windows(plan.windows, plan.recipe, plan.skeleton, plan.view.read)
    given = {"a": None, "b": written, "c": written.flip(0).flip(1)}
    for name, windows in given.items():
        quantize(replace(_plan(tmp_path / "model"), written=windows), tmp_path / name)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in given)
    assert a == b
    assert a != c
    with pytest.raises(ValueError, match=r"written windows of shape \[4, 16\]; .* ask for \[5, 16\]"):
        quantize(replace(_plan(tmp_path / "model"), written=written[:4]), tmp_path / "d")


def test_windows_shorter_than_their_beginnings_are_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ZqError, match="cannot write calibration windows of 4 tokens"):
        make_plan(
            tmp_path, Recipe.parse(RECIPE.replace("SOURCE", "random").replace("length: 16", "length: 4"))
        )


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    save_tiny("bert", tmp_path)
    assert _plan(tmp_path, "random").tokens == 6 * 16
    with pytest.raises(ZqError, match="needs calibration tokens; drop --calib none"):
        _plan(tmp_path, "none")
