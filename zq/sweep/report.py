"""What a sweep leaves beside results.jsonl: summary.json, the figures, index.html. Made from all rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zq.checkpoint.writer import write_atomic
from zq.sweep import plots
from zq.sweep.page import page
from zq.sweep.points import points
from zq.sweep.store import Row
from zq.sweep.summary import metrics, summarize

SUMMARY, PAGE = "summary.json", "index.html"


def write_report(
    rows: Sequence[Row], folder: Path, skipped: Sequence[tuple[str, str]] = ()
) -> dict[str, Any]:
    """Write everything into `folder`; the summary, with the files written under "files". Figures only where
    matplotlib is installed. Raises OutputError (disk)."""
    summary = summarize(rows)
    found = points(rows)
    drawn: list[Path] = []
    if plots.is_available():
        for measures in metrics(found).values():
            drawn += plots.draw(found, measures, folder)
    svg = {path.stem: path.read_text(encoding="utf-8") for path in drawn if path.suffix == ".svg"}
    summary["skipped"] = [{"what": what, "why": why} for what, why in skipped]
    write_atomic(folder / PAGE, page(summary, svg, skipped))
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=1, allow_nan=False) + "\n")
    return summary | {"files": [str(folder / PAGE), *map(str, drawn), str(folder / SUMMARY)]}
