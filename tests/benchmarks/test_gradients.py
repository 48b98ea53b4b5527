"""The benchmark of distillation with integer gradients: it runs, goes on, and its intervals are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gradients
import pages
import pytest
import tables

from tests.letters import save_tokenizer
from tests.tiny import save_tiny


def test_it_runs_on_the_first_blocks_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny("llama", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    out, said = tmp_path / "out.json", []
    options = "--blocks 1 --weights int3:g32 --iterations 4 --samples 8 --length 16 --seeds 1 --commit abc"
    monkeypatch.setattr(
        sys, "argv", ["gradients.py", str(tmp_path / "model"), *options.split(), "--out", str(out)]
    )
    gradients.main(said.append)
    rows = json.loads(out.read_text())["rows"]
    assert [(row["scheme"], row["method"]) for row in rows] == [
        (inputs, kind) for inputs in ("float", "quantized") for kind in ("float", "int8")
    ]
    assert all(len(row["held_out_loss"]) == 1 and row["commit"] == "abc" for row in rows)
    starts = {row["held_out_loss"].popitem()[1]["start"] for row in rows}
    assert len(starts) == 1  # the same start on the same windows
    assert "model, the first 1 blocks, weights int3:g32; 4 iterations of 2 of 8 windows" in said[-1]
    before = len(said)
    gradients.main(said.append)
    assert len(said) == before + 1  # nothing but the table


@pytest.mark.parametrize("count", [0, 9])
def test_blocks_that_the_model_does_not_have(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "model")
    monkeypatch.setattr(
        sys, "argv", ["gradients.py", str(tmp_path / "model"), "--blocks", str(count), "--seeds", "0"]
    )
    with pytest.raises(SystemExit, match=f"--blocks {count} is not allowed; the model has 2"):
        gradients.main()


def row(inputs: str, method: str, seed: int, *ends: float) -> dict:
    losses = {f"block {i}": {"start": 1.0, "end": end} for i, end in enumerate(ends)}
    key = {"table": "gradients", "scheme": inputs, "method": method, "seed": seed}
    return {**key, "held_out_loss": losses, "seconds": 2.0}


def test_blocks_are_samples_only_where_they_are_independent() -> None:
    rows = [
        row(inputs, method, seed, 0.5, 0.5 * up)
        for inputs in ("float", "quantized")
        for seed in (0, 1)
        for method, up in (("float", 1.0), ("int8", 1.21))
    ]
    settings = {"model": "demo", "blocks": None, "weights": "int4:g64", "iterations": 3, "batch": 2}
    settings |= {"lookahead": 0, "holdout": 0.25, "samples": 8, "length": 16}
    text = pages.all_tables({"environment": {"device": "abacus"}, "protocol": settings, "rows": rows})
    assert "| float | float | 2 | 50.0 % | 1 |  |  |  | 2 |" in text
    # log 1.1 = .0953 in the mean, spread .1101, over the root of 4 times t of 3 degrees of freedom
    assert "| float | int8 | 2 | 45.0 % | 1.100 | 0.923, 1.310 | 4 | 1.00, 1.21 | 2 |" in text
    assert "| quantized | int8 | 2 | 45.0 % | 1.100 | 1.100, 1.100 | 2 | 1.00, 1.21 | 2 |" in text


@pytest.mark.parametrize("known", [(1, 12.706), (9, 2.262), (10, 2.228), (40, 2.021), (400, 1.966)])
def test_quantiles_of_t(known: tuple[int, float]) -> None:
    assert tables.t_95(known[0]) == pytest.approx(known[1], abs=1e-3)
