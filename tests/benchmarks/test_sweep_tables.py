"""Tables of a sweep's lines are what its own findings are."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from pages import refreshed, tables_of

from tests.sweep.conftest import row


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    rows = [
        row("m", 16, 4_000_000, (0.0, 0.0, 0.0), (3.0, 3.2, 3.4), original=True, block=""),
        row("m", 4, 1_100_000, (0.1, 0.1, 0.4), (3.1, 3.3, 3.5)),
        row("m", 4, 1_120_000, (0.1, 0.1, 0.1), (3.1, 3.3, 3.5), type="nf"),
        row("m", 3, 900_000, (1.5, 1.5, 1.5), (4.0, 4.0, 4.0)),
    ]
    data = "".join(json.dumps(each) + "\n" for each in rows).encode()
    (tmp_path / "results.jsonl.gz").write_bytes(gzip.compress(data))
    run = {"commit": "abc", "device": "abacus", "minutes": 7}
    (tmp_path / "run.json").write_text(json.dumps(run))
    return tmp_path / "results.jsonl.gz"


def test_cells(lines: Path) -> None:
    text = tables_of(lines)["sweep"]()
    assert "| bits | block | MB | MB in blocks | int | nf |" in text
    assert "| 3 | 64 | 0.9 | 0.5 | 1.500 [1.500, 1.500] | – |" in text
    assert "| 4 | 64 | 1.1 | 0.6 | .2000 [.1000, .4000] | .1000 [.1000, .1000] |" in text
    assert "4 cells, 5 windows of 24 tokens. abacus; zq " in text
    assert text.endswith(", commit abc; 7 minutes.\n")


def test_budgets(lines: Path) -> None:
    text = tables_of(lines)["budgets"]()
    assert "| all weights | 0.9 to 1.04 | 3, int 64 | 1.5000 [1.5000, 1.5000] | 3: 100 % |" in text
    assert "| 16, original | .0000 [.0000, .0000] | 16: 100 % |" in text


def test_in_a_page(lines: Path) -> None:
    page = refreshed("<!-- table: results.jsonl.gz sweep -->\n<!-- end -->\n", lines.parent)
    assert tables_of(lines)["sweep"]() in page
    with pytest.raises(SystemExit, match="no rows of the table integer"):
        refreshed("<!-- table: results.jsonl.gz integer -->\n<!-- end -->\n", lines.parent)
