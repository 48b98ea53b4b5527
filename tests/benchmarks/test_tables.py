"""Tables say what the results say; docs/results.md is what the results give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pages import MARKED, RESULTS, TABLES, all_tables, refreshed
from tables import accuracy, number

PAGE = Path(__file__).resolve().parents[2] / "docs" / "results.md"
PAGES = sorted(p for p in PAGE.parent.glob("*.md") if MARKED.search(p.read_text(encoding="utf-8")))


def document(*rows: dict) -> dict:
    return {
        "environment": {"device": "abacus", "torch": "2"},
        "protocol": {"windows": 4, "length": 32, "start": 0.55},
        "rows": list(rows),
    }


def row(method: str, kl: float, seed: int = 0, **more: object) -> dict:
    measured = {"kl": kl, "reference": {"ppl": 10.0}, "candidate": {"ppl": 10 + kl}}
    place = {"table": "methods", "scheme": "w8a8", "method": method, "seed": seed}
    return place | {"texts": {"book": measured}, "mean_kl": kl} | more


def test_seeds_become_one_line_with_their_spread():
    text = accuracy(document(row("lkd", 0.1), row("lkd", 0.3, 1), row("rtn", 0.5)), "methods")
    assert text.splitlines()[2:4] == [
        "| w8a8 | lkd | 10.200 | .2000 | .2000 (sd .1414, 2 seeds) |",
        "| w8a8 | rtn | 10.500 | .5000 | .5000 |",
    ]
    assert (
        "Original: book PPL 10.000. 4 windows of 32 tokens of each text, from 55% on. abacus; torch 2."
        in text
    )


def test_columns_that_nobody_measured_are_left_out():
    bare = accuracy(document(row("rtn", 0.5)), "methods").splitlines()[0]
    assert bare == "| scheme | method | book PPL | KL | mean KL |"
    rows = row("rtn", 0.5), row("lkd", 0.1, seconds=12.4, peak_gpu_bytes=3e9, peak_rss_bytes=None, commit="c")
    header, _, rtn, lkd, *_, where = accuracy(document(*rows), "methods").splitlines()
    assert header.endswith("| mean KL | s | GPU |")
    assert rtn.endswith("| .5000 | – | – |")
    assert lkd.endswith("| .1000 | 12 | 3000 MB |")
    assert where.endswith("commit c.")


def test_numbers():
    assert [number(x, 4) for x in (0.02974, 1.25, -0.5, None)] == [".0297", "1.2500", "-0.5000", "–"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_what_the_results_give(page: Path):
    text = page.read_text(encoding="utf-8")
    assert refreshed(text) == text, f"run: python benchmarks/accuracy.py --write docs/{page.name}"


def test_a_figure_changed_by_hand_is_seen():
    text = PAGE.read_text(encoding="utf-8")
    forged = text.replace("| .0297", "| .0197")
    assert forged != text
    assert refreshed(forged) == text


@pytest.mark.parametrize("mark", ["nowhere.json methods", "accuracy-smollm2-h200.json methods"])
def test_a_mark_without_results_is_refused(mark: str):
    with pytest.raises(SystemExit):
        refreshed(f"<!-- table: {mark} -->\n<!-- end -->\n")


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.name)
def test_every_results_file_has_tables(path: Path):
    document = json.loads(path.read_text(encoding="utf-8"))
    assert {row["table"] for row in document["rows"]} <= set(TABLES)
    assert "\n| --- |" in all_tables(document)
    assert document["environment"]["device"]


def test_seconds_beside_other_work_are_no_seconds():
    rows = row("lkd", 0.1, seconds=90.0, beside=1), row("lkd", 0.3, 1, seconds=60.0), row("rtn", 0.5)
    header, _, lkd, _, *_ = accuracy(document(*rows), "methods").splitlines()
    assert header.endswith("| s |")
    assert lkd.endswith("| 60 |")
    alone = accuracy(document(row("lkd", 0.1, seconds=90.0, beside=1)), "methods")
    assert "| s |" not in alone
