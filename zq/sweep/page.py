"""One HTML file about a sweep: findings, figures, tables. Fetches nothing; light and dark."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from zq.sweep.points import METRICS, SIZES
from zq.sweep.summary import gigabits, percent, width

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e4e4; --paper: #161616; --line: #444; --soft: #9a9a9a; }
  figure svg { filter: invert(1) hue-rotate(180deg); }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
       max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .15rem .7rem; border-bottom: 1px solid var(--line);
         white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
small, .soft { color: var(--soft); }
"""
CAPTION = (
    "Line: the best cells of a width. Grey: the front over all widths. Bars: 95 % bootstrap intervals over "
    "windows. Hollow markers at the upper edge lie above it."
)


def page(summary: Mapping[str, Any], figures: Mapping[str, str], skipped: Sequence[tuple[str, str]]) -> str:
    """The HTML. `figures`: metric -> text of its SVG file; `skipped`: what was not measured, and why."""
    models = ", ".join(model["name"] for model in summary["models"])
    title = f"zq sweep: {models}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(sentence)}</p>" for sentence in summary["findings"]),
        *(_figure(metric, svg) for metric, svg in figures.items()),
        "<h2>Which width wins at which budget</h2>",
        *(_contest(each, summary) for each in summary["contests"]),
        "<h2>All cells</h2>",
        _cells(summary),
        "<h2>How it was measured</h2>",
        _table(("", ""), [(name, _plain(value)) for name, value in summary["setting"].items()]),
        _table(
            ("model", "parameters", "sha256 of its files and tokens"),
            [(m["name"], f"{m['parameters']:,}", m["identity"][:16]) for m in summary["models"]],
        ),
    ]
    if skipped:
        parts += ["<h2>Not measured</h2>", _table(("what", "why"), skipped)]
    body = "\n".join(parts)
    head = (
        '<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{body}\n</body>\n</html>\n'


def inline(svg: str, prefix: str) -> str:
    """An SVG file as part of a page: without its prologue and metadata, which name addresses elsewhere, and
    with ids that no other figure of the page has."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{prefix}-', body)
    body = re.sub(r'href="#', f'href="#{prefix}-', body)
    return re.sub(r"url\(#", f"url(#{prefix}-", body)


def _figure(metric: str, svg: str) -> str:
    label = escape(METRICS[metric])
    return (
        f'<figure role="img" aria-label="{label} by size">{inline(svg, metric)}'
        f"<figcaption><small>{label}. {CAPTION}</small></figcaption></figure>"
    )


def _contest(each: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    cells = summary["cells"]
    rows = []
    for row in each["budgets"]:
        cell = cells[row["cell"]]
        won = row["shares"] or {}
        rows.append(
            (
                gigabits(row["budget"]),
                f"{row['budget'] / 1e6:.4g} MB",
                width(row["bits"]),
                f"{cell['model']} {cell['spec']}",
                number(row["value"], row["interval"]),
                ", ".join(f"{bits}: {percent(share)}" for bits, share in won.items()) or "one window",
            )
        )
    names = ", ".join(each["models"])
    heading = f"{METRICS[each['metric']]}, {SIZES[each['size']]}: {names}"
    header = ("budget", "", "best", "cell", each["metric"], "resamples won by bits")
    return f"<h3>{escape(heading)}</h3>{_table(header, rows)}"


def _cells(summary: Mapping[str, Any]) -> str:
    chosen = [metric for metric in METRICS if summary["cells"] and metric in summary["cells"][0]]
    header = ("cell", "bits", "type", "block", "bytes", "in blocks", "bits per weight", *chosen, "same top-1")
    rows = [
        (
            f"{c['model']} {c['spec']}",
            str(c["bits"]),
            c["type"],
            c["block"],
            f"{c['bytes']['all']:,}",
            f"{c['bytes']['blocks']:,}",
            f"{c['bits_per_weight']:.3f}",
            *(number(c[metric], c[f"{metric}_interval"]) for metric in chosen),
            f"{100 * c['top1_agreement']:.1f} %",
        )
        for c in summary["cells"]
    ]
    return _table(header, rows)


def number(value: float, interval: Sequence[float] | None) -> str:
    """A value with its interval: 0.2392 [0.2251, 0.2533]."""
    text = f"{value:.4g}"
    return text if interval is None else f"{text} [{interval[0]:.4g}, {interval[1]:.4g}]"


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
