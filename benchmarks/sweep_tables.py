"""Tables of what `zq sweep` measured on one model: its lines (gzip), and run.json beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tables import Cells, markdown, number

from zq.sweep.points import SIZES
from zq.sweep.summary import percent, summarize


def read(path: Path) -> dict[str, Any]:
    """{"rows", "run"} of OUT/results.jsonl.gz."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    run = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))
    return {"rows": [json.loads(line) for line in lines], "run": run}


def cells(document: dict[str, Any]) -> str:
    """KL by width and block, one column for each type; sizes are those of the first type."""
    found = {(c["bits"], c["block"], c["type"]): c for c in summarize(document["rows"])["cells"]}
    types = list(dict.fromkeys(row["cell"]["type"] for row in document["rows"] if row["cell"]["spec"]))
    lines = []
    for bits, block in dict.fromkeys((b, k) for b, k, type in found if type in types):
        size = next(found[bits, block, type]["bytes"] for type in types if (bits, block, type) in found)
        line = [str(bits), block, f"{size['all'] / 1e6:.1f}", f"{size['blocks'] / 1e6:.1f}"]
        lines.append([*line, *(_kl(found.get((bits, block, type))) for type in types)])
    lines.sort(key=lambda line: float(line[2]))
    return f"{markdown(['bits', 'block', 'MB', 'MB in blocks', *types], lines)}\n{_caption(document)}"


def budgets(document: dict[str, Any]) -> str:
    """Which cell wins at which budget by KL and by perplexity; budgets with one answer together."""
    summary = summarize(document["rows"])
    named, lines = summary["cells"], []
    for size, what in SIZES.items():
        by = [
            next(c for c in summary["contests"] if (c["metric"], c["size"]) == (metric, size))["budgets"]
            for metric in ("kl", "ppl")
        ]
        runs: list[tuple[list[str], list[float]]] = []
        for kl, ppl in zip(*by, strict=True):
            answer = [*_won(kl, named, 4), *_won(ppl, named, 2)]
            if not runs or runs[-1][0] != answer:
                runs.append((answer, []))
            runs[-1][1].append(kl["budget"] / 1e6)
        for answer, sizes in runs:
            at = f"{sizes[0]:.4g}" + (f" to {sizes[-1]:.4g}" if len(sizes) > 1 else "")
            lines.append([what, at, *answer])
    header = ["size", "MB", "bits by KL", "KL", "resamples", "bits by perplexity", "perplexity", "resamples"]
    return f"{markdown(header, lines)}\n{_caption(document)}"


def _won(row: dict[str, Any], named: Sequence[dict[str, Any]], digits: int) -> Cells:
    cell = named[row["cell"]]
    low, high = row["interval"]
    value = f"{number(row['value'], digits)} [{number(low, digits)}, {number(high, digits)}]"
    shares = ", ".join(f"{bits}: {percent(share)}" for bits, share in row["shares"].items())
    return [f"{row['bits']}, {cell['type']} {cell['block']}".rstrip(), value, shares]


def _kl(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "–"
    digits = 4 if cell["kl"] < 1 else 3
    low, high = (number(edge, digits) for edge in cell["kl_interval"])
    return f"{number(cell['kl'], digits)} [{low}, {high}]"


def _caption(document: dict[str, Any]) -> str:
    setting, run = document["rows"][-1]["setting"], document["run"]
    facts = {name: setting[name] for name in ("zq", "torch", "transformers")} | {"commit": run["commit"]}
    text = f"{len(document['rows'])} cells, {setting['windows']} windows of {setting['length']} tokens. "
    text += f"{run['device']}; {', '.join(f'{name} {value}' for name, value in facts.items())}; "
    return f"{text}{run['minutes']} minutes.\n"


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"sweep": cells, "budgets": budgets}
