"""Ratios, and the file that always holds what there is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from zq.bench.results import Results, environment, with_ratios
from zq.errors import ZqError


def row(engine: str, batch: int, prefill: float, token: float, peak: int | None) -> dict[str, Any]:
    times = {"prefill_ms": prefill, "ms_per_token": token, "tokens_per_s": 1e3 * batch / token}
    return {"engine": engine, "batch": batch, **times, "memory": {"held": 1, "peak": peak, "reserved": None}}


ROWS = [
    row("zq", 1, 10.0, 2.0, 100),
    row("zq", 8, 40.0, 4.0, 200),
    row("eager", 1, 30.0, 8.0, 250),
    row("compiled", 1, 20.0, 3.0, 300),
    {"engine": "compiled", "batch": 8, "error": "out of memory"},
]


def test_ratios_are_times_of_the_baseline_over_own_of_the_same_batch():
    done = with_ratios(ROWS, "decode")
    assert done[0]["faster"] == {
        "eager": {"prefill_ms": 3.0, "ms_per_token": 4.0},
        "compiled": {"prefill_ms": 2.0, "ms_per_token": 1.5},
    }
    assert done[0]["smaller"] == {"eager": 2.5, "compiled": 3.0}
    assert "faster" not in done[1], "its baseline failed"
    assert done[2]["faster"] == {"compiled": {"prefill_ms": 0.667, "ms_per_token": 0.375}}
    assert done[3]["faster"]["eager"]["ms_per_token"] == 2.667
    assert done[4] == ROWS[4]
    assert [row["engine"] for row in ROWS if "faster" in row] == [], "what is given stays as it is"


def test_ratios_of_what_could_not_be_measured_are_missing():
    done = with_ratios([row("zq", 1, 1.0, -0.5, None), row("eager", 1, 2.0, 3.0, 5)], "decode")
    assert done[0]["faster"]["eager"] == {"prefill_ms": 2.0, "ms_per_token": None}
    assert done[0]["smaller"] == {"eager": None}


def test_the_file_is_whole_after_every_row(tmp_path: Path):
    file = tmp_path / "speed.json"
    results = Results({"mode": "decode"}, {"device": "x"}, file)
    results.add(ROWS[4])
    assert not file.exists(), "nothing was measured yet"
    for count, each in enumerate(ROWS[:3], start=2):
        results.add(each)
        held = json.loads(file.read_text())
        assert len(held["rows"]) == count
        assert held["complete"] is False
    results.finish()
    assert json.loads(file.read_text())["complete"] is False, "a row has an error"
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_a_finished_run_says_so_and_numbers_that_json_has_not_are_null(tmp_path: Path):
    file = tmp_path / "speed.json"
    results = Results({"mode": "decode"}, {}, file)
    results.add(row("zq", 1, math.inf, 2.0, 3))
    results.finish()
    held = json.loads(file.read_text())
    assert held["complete"] is True
    assert held["rows"][0]["prefill_ms"] is None


@pytest.mark.parametrize("file", ["NOWHERE/speed.json", "."])
def test_a_place_that_cannot_be_written(file: str, tmp_path: Path):
    with pytest.raises(ZqError, match="cannot be written"):
        Results({"mode": "decode"}, {}, tmp_path / file)


def test_the_environment_names_device_and_versions():
    found = environment("cpu", "abc1234")
    assert found["commit"] == "abc1234"
    assert "cores" in found["device"]
    assert {"zq", "torch", "transformers", "python", "threads"} <= set(found)
