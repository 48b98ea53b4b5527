"""The page is one file that asks for nothing, and everything that was measured is on it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from tests.sweep.conftest import row
from tests.sweep.test_summary import ladder
from zq.sweep import plots
from zq.sweep.page import inline, page
from zq.sweep.report import write_report
from zq.sweep.summary import summarize


class Checked(HTMLParser):
    """Collects ids, references and whatever would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            value = value or ""
            if name == "id":
                self.ids.append(value)
            self.references += re.findall(r"url\(#([^)]+)\)", value)
            if name in ("href", "xlink:href", "src", "srcset", "action", "data"):
                if value.startswith("#"):
                    self.references.append(value[1:])
                else:
                    self.fetched.append(value)
        if tag in ("script", "link", "iframe", "object", "embed", "img"):
            self.fetched.append(tag)


def test_a_page_with_figures_asks_for_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    summary = write_report(ladder(), tmp_path, [("nf of 2 bits", "nf has 3 to 8 bits")])
    assert {p.name for p in tmp_path.iterdir()} == {
        *("index.html", "summary.json", "kl.png", "kl.svg", "ppl.png", "ppl.svg")
    }
    text = (tmp_path / "index.html").read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.fetched == []
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(set(checked.ids)) == len(checked.ids)
    assert set(checked.references) <= set(checked.ids)
    assert checked.references
    assert text.count("<svg") == 2
    assert "prefers-color-scheme: dark" in text
    assert "nf of 2 bits" in text
    assert json.loads((tmp_path / "summary.json").read_text())["findings"] == summary["findings"]


def test_every_cell_budget_and_finding_is_on_it():
    summary = summarize(ladder())
    text = page(summary, {}, [])
    for cell in summary["cells"]:
        assert f"{cell['model']} {cell['spec']}" in text
    for contest in summary["contests"]:
        assert text.count(f"{contest['budgets'][0]['budget'] / 1e6:.4g} MB") >= 1
    for sentence in summary["findings"]:
        assert sentence in text
    assert "Not measured" not in text


def test_names_are_escaped():
    text = page(summarize([row("<script>x</script>")]), {}, [("<b>", "&")])
    assert "<script>" not in text
    assert "&lt;script&gt;x&lt;/script&gt;" in text
    assert "<td>&lt;b&gt;</td><td>&amp;</td>" in text


def test_inlined_figures_keep_their_references_apart():
    svg = '<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">\n<svg><metadata>http://a</metadata>'
    svg += '<path id="p"/><use xlink:href="#p" clip-path="url(#p)"/></svg>'
    assert inline(svg, "kl") == '<svg><path id="kl-p"/><use xlink:href="#kl-p" clip-path="url(#kl-p)"/></svg>'


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "is_available", lambda: False)
    summary = write_report(ladder(), tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"index.html", "summary.json"}
    assert len(summary["files"]) == 2
