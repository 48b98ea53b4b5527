"""Rows to points to sentences: what competes with what, and how surely."""

from __future__ import annotations

import math

import pytest

from tests.sweep.conftest import SETTING, row
from zq.sweep.points import measured, points
from zq.sweep.summary import CAVEAT, gigabits, percent, rivals, summarize


def ladder() -> list[dict]:
    """Two models; at 4 bits the large one is as large as the small original, and better in every window."""
    return [
        row("small", 16, 400, (0.0, 0.0, 0.0), (3.0, 3.2, 3.4), original=True, parameters=20),
        row("small", 4, 110, (0.1, 0.1, 0.2), (3.2, 3.3, 3.5), parameters=20),
        row("small", 3, 90, (0.9, 0.9, 0.9), (5.0, 3.25, 3.45), parameters=20),
        row("large", 16, 1600, (0.0, 0.0, 0.0), (2.0, 2.2, 2.4), original=True, parameters=80),
        row("large", 4, 400, (0.1, 0.1, 0.2), (2.1, 2.3, 2.6), parameters=80),
        row("large", 3, 300, (0.5, 0.9, 0.7), (3.9, 4.0, 4.1), parameters=80),
    ]


def test_kl_competes_within_a_model_and_perplexity_between_models_of_the_same_tokens():
    found = points(ladder())
    assert [p.model for p in found] == ["small"] * 3 + ["large"] * 3
    assert [[found[i].model for i in group] for group in rivals(found, "kl")] == [
        ["small"] * 3,
        ["large"] * 3,
    ]
    assert rivals(found, "ppl") == [[0, 1, 2, 3, 4, 5]]
    rows = ladder()
    rows[3:] = [r | {"tokens": "of another tokenizer"} for r in rows[3:]]
    assert rivals(points(rows), "ppl") == [[0, 1, 2], [3, 4, 5]]


def test_the_winner_at_each_budget():
    summary = summarize(ladder())
    contest = next(c for c in summary["contests"] if (c["metric"], c["size"]) == ("ppl", "all"))
    cells = summary["cells"]
    at = {row["budget"]: (cells[row["cell"]]["model"], row["bits"]) for row in contest["budgets"]}
    assert at[90] == ("small", 3)
    assert at[1600] == ("large", 16)
    budget = next(b for b in sorted(at) if b >= 400)
    assert at[budget] == ("large", 4), "of the same size as the small original, and better"
    assert {cells[f["cell"]]["bytes"]["all"] for f in contest["front"]} == {90, 110, 400, 1600}
    assert all(f["share"] == 1 for f in contest["front"] if cells[f["cell"]]["bytes"]["all"] >= 400)


def test_shares_say_how_surely():
    """3 bits of the small model win where one window out of three is not drawn: (2/3)^3 of resamples."""
    rows = [
        row("m", 3, 100, (9.0, 0.10, 0.10), (2.0, 2.0, 2.0)),
        row("m", 4, 100, (0.2, 0.11, 0.11), (2.0, 2.0, 2.0)),
    ]
    contest = summarize(rows)["contests"][0]
    (only,) = contest["budgets"]
    assert (only["bits"], only["value"]) == (4, pytest.approx(0.14))
    assert only["shares"][3] == pytest.approx((2 / 3) ** 3, abs=0.03)
    assert only["shares"][3] + only["shares"][4] == pytest.approx(1)
    text = summarize(rows)["findings"][0]
    assert text.startswith("KL divergence of m by size (all weights), 2 cells: undecided at 800 bit (3 bits ")


def test_findings_in_words():
    *sentences, few, caveat, last = summarize(ladder())["findings"]
    assert few.startswith("5 windows are few: below 8 believe neither")
    assert caveat == CAVEAT
    assert last.startswith("Accuracy was not measured. To add it, sweep into another -o with --tasks ")
    assert len(sentences) == 6  # KL of two models and perplexity of both, by two sizes
    assert "32 bits" not in sentences[0]
    assert "16 bits, the original, at " in sentences[0]
    assert "4 bits from " in sentences[0]
    assert "(100 % of resamples)" in sentences[0]


@pytest.mark.parametrize("tasks", [[], ["piqa"]])
@pytest.mark.parametrize("windows", [1, 7, 8])
def test_what_the_figures_do_not_say(windows: int, tasks: list[str]):
    rows = [row("m", 4, setting=SETTING | {"windows": windows, "tasks": tasks})]
    text = " ".join(summarize(rows)["findings"])
    assert ("7 windows are few" in text) == (windows == 7)
    assert ("1 window is few" in text) == (windows == 1)
    assert ("believe neither" in text) == (windows < 8)
    assert ("Accuracy was not measured" in text) == (not tasks)


def test_one_window_gives_no_interval_and_says_so():
    rows = [row("m", 3, 100, (0.5,), (2.0,)), row("m", 4, 120, (0.2,), (2.0,))]
    summary = summarize(rows)
    assert summary["cells"][0]["kl_interval"] is None
    assert summary["contests"][0]["budgets"][0]["shares"] is None
    assert "one window, so nobody knows how surely" in summary["findings"][0]


def test_figures_are_means_over_seeds_of_each_window():
    rows = [row("m", 4, 100, (0.1, 0.3), (2.0, 3.0)), row("m", 4, 100, (0.3, 0.5), (2.0, 5.0), seed=1)]
    (point,) = points(rows)
    assert (point.seeds, point.kl, point.nll) == (2, (0.2, 0.4), (2.0, 4.0))
    assert len(points([*rows, rows[0]])) == 1  # a row that is there twice counts once
    assert points([*rows, rows[0]])[0].kl == (0.2, 0.4)


def test_two_models_of_one_name_are_told_apart():
    rows = [row("m", 4, identity="aaaaaaaa"), row("m", 4, identity="bbbbbbbb")]
    assert {p.model for p in points(rows)} == {"m (aaaaaa)", "m (bbbbbb)"}


def test_perplexity_is_the_exponential_of_the_mean():
    found = measured(points(ladder()), "ppl")
    assert found.shown[2] == pytest.approx(math.exp(3.2)), "the small original is its largest cell"
    low, high = found.intervals[2] or (0, 0)
    assert math.exp(3.0) - 1e-9 <= low < found.shown[2] < high <= math.exp(3.4) + 1e-9


def test_accuracy_is_the_mean_of_its_tasks_and_more_is_better():
    tasks = {"a": [1.0, 1.0, 0.0, 0.0], "b": [1.0, 1.0]}
    worse = {"a": [0.0, 1.0, 0.0, 0.0], "b": [1.0, 0.0]}
    rows = [row("m", 4, 100, tasks=tasks), row("m", 3, 90, tasks=worse)]
    summary = summarize(rows)
    assert [c["accuracy"] for c in summary["cells"]] == [0.375, 0.75]
    contest = next(c for c in summary["contests"] if c["metric"] == "accuracy")
    assert contest["budgets"][-1]["bits"] == 4
    assert "accuracy" not in summarize([*rows, row("m", 8)])["cells"][0], "not every cell has it"


@pytest.mark.parametrize(
    ("size", "text"),
    [(50, "400 bit"), (78_600, "629 kbit"), (113.1e6, "905 Mbit"), (1e9, "8 Gbit"), (3e11, "2.4 Tbit")],
)
def test_sizes_in_words(size, text):
    assert gigabits(size) == text


def test_only_all_is_100_percent():
    assert [percent(x) for x in (1.0, 0.9995, 0.29, 0.0)] == ["100 %", "99 %", "29 %", "0 %"]
