"""Rows out of child processes."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.tiny import save_tiny
from zq.bench import run as bench
from zq.bench.clock import LEAST, Memory, timed
from zq.bench.subject import RANDOM, Subject
from zq.bench.task import Task, measure
from zq.errors import ZqError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = tmp_path_factory.mktemp("models") / "llama"
    save_tiny("llama", found)
    return found


def task(mode: str = "decode", **more) -> Task:
    return Task(**{"mode": mode, "length": 8, "new": 4, "device": "cpu", "seconds": 0.0, **more})


def test_figures_of_a_decoder(folder: Path):
    subject = Subject(folder=folder, against=str(folder))
    row = measure(subject.build("eager", "cpu"), "eager", task(profile=True, new=12), 3)
    assert row["prefill_ms"] > 0
    assert len(row["runs_ms"]["whole"]) >= LEAST
    assert row["tokens_per_s"] == pytest.approx(3e3 / row["ms_per_token"])
    assert row["memory"]["peak"] >= row["memory"]["held"] > 1e7
    assert row["profile"]["launches"] > 10
    assert row["profile"]["busy_ms"] >= row["profile"]["top"][0]["ms"] > 0


def test_figures_of_a_prompt_and_of_an_encoder():
    prefill = measure(
        Subject(shape="gpt2", layers=1, scheme="w8a8", against=RANDOM).build("eager", "cpu"),
        *("eager", task("prefill"), 2),
    )
    assert prefill["tokens_per_s"] == pytest.approx(16e3 / prefill["prefill_ms"])
    encode = measure(
        Subject(shape="bert-base", layers=1, scheme="w8a8").build("zq", "cpu"), "zq", task("encode"), 2
    )
    assert encode["sequences_per_s"] == pytest.approx(2e3 / encode["ms_per_batch"])


def test_rows_come_in_order_with_what_ran(folder: Path):
    subject = Subject(folder=folder, against=RANDOM)
    rows = list(bench.run(subject, task(), ["zq", "eager"], [1, 2]))
    assert [(row["engine"], row["batch"]) for row in rows] == [
        *(("zq", 1), ("zq", 2), ("eager", 1), ("eager", 2))
    ]
    assert not any("error" in row for row in rows)
    assert rows[0]["dtype"] == "float32"
    assert rows[2]["dtype"] == "bfloat16"
    assert any(line.startswith("fused") or line.startswith("as they") for line in rows[0]["optimized"])


def test_what_cannot_be_loaded_fails_in_every_batch_and_the_others_go_on(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    rows = list(bench.run(Subject(folder=tmp_path, against=str(folder)), task(), ["zq", "eager"], [1, 2]))
    assert [row.get("error", "")[-40:] for row in rows[:2]] == [rows[0]["error"][-40:]] * 2
    assert "holds no weights" in rows[0]["error"]
    assert all("ms_per_token" in row for row in rows[2:])


def test_the_time_limit_ends_a_child_and_says_so(folder: Path):
    begun = time.monotonic()
    rows = list(bench.run(Subject(folder=folder, against=RANDOM), task(), ["zq", "eager"], [1, 2], limit=0.5))
    assert time.monotonic() - begun < 8
    assert [row["error"] for row in rows] == [bench.LATE] * 4


def test_leaving_ends_the_child(folder: Path):
    import multiprocessing

    with closing(bench.run(Subject(folder=folder), task(), ["zq"], [1, 2])) as rows:
        next(rows)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_runs_are_repeated_for_the_time_that_was_asked_for():
    calls = []
    spent = timed(lambda: calls.append(time.sleep(0.002)), "cpu", 0.05)
    assert LEAST < len(spent) <= 26
    assert len(calls) == len(spent)
    assert all(ms >= 2 for ms in spent)
    assert len(timed(lambda: None, "cpu", 0)) == LEAST


def test_peak_memory_is_of_what_happened_since():
    memory = Memory("cpu")
    made = torch.ones(30_000_000)
    before = memory.to_dict()
    del made
    if before["peak"] is None:
        pytest.skip("this kernel does not reset the peak")
    assert 100e6 < before["peak"] - before["held"] < 300e6
    again = Memory("cpu").to_dict()
    assert again["peak"] < before["peak"]


def test_the_original_must_be_of_the_same_model(folder: Path, tmp_path: Path):
    save_tiny("gpt2", tmp_path / "gpt2")
    with pytest.raises(ZqError, match="is another model"):
        Subject(folder=folder, against=str(tmp_path / "gpt2")).check()
    Subject(folder=folder, against=str(folder)).check()
    Subject(folder=folder, against=RANDOM).check()
