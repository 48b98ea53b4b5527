"""The figures of a sweep, for a paper: PNG of 200 dpi and SVG for each metric, the same bytes each time.

Two panels: size of all weights, and without embeddings and head. Colour and line say the width, the marker
the model (or, with one model, the data type); a line joins the cells of a width that no other cell of this
width beats; the grey steps are the front over all widths; bars are 95 % intervals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zq.sweep.front import on_front
from zq.sweep.points import METRICS, SIZES, Measured, Point
from zq.sweep.summary import rivals

# Okabe and Ito (2008): told apart with every kind of colour vision; black is the original.
COLOURS = {2: "#CC79A7", 3: "#D55E00", 4: "#0072B2", 5: "#E69F00", 6: "#009E73", 7: "#56B4E9", 8: "#7F7F7F"}
LINES = {2: (0, (1, 1)), 3: "-", 4: "--", 5: "-.", 6: ":", 7: (0, (5, 1, 1, 1, 1, 1)), 8: (0, (6, 2))}
MARKERS = "osD^vP*X<>ph"
CAP = 10  # times the largest original: what is above is drawn at the edge
STYLE = {
    "font.size": 8,
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "svg.fonttype": "path",
}


def is_available() -> bool:
    """Whether matplotlib is installed."""
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def draw(points: Sequence[Point], measures: Measured, folder: Path) -> list[Path]:
    """Write METRIC.png and METRIC.svg into `folder`; the paths. Needs matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure

    name = measures.metric
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": f"zq {name}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.0, 3.4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for panel, size in zip(axes, SIZES, strict=True):
            _panel(panel, points, measures, size)
        axes[0].set_ylabel(_label(name))
        drawn = [p for p in points if not (name == "kl" and p.is_original)]
        _legend(figure, points, drawn)
        paths = [folder / f"{name}.png", folder / f"{name}.svg"]
        figure.savefig(paths[0], dpi=200, metadata={"Software": None})
        figure.savefig(paths[1], metadata={"Date": None, "Creator": "zq"}, transparent=True)
    return paths


def _label(metric: str) -> str:
    return {"kl": "KL divergence (nats per token)", "ppl": "perplexity"}.get(metric, METRICS[metric])


def _panel(panel: Any, points: Sequence[Point], measures: Measured, size: str) -> None:
    drawn = [i for i, p in enumerate(points) if not (measures.metric == "kl" and p.is_original)]
    top = _cap(points, measures)
    x = {i: 8 * points[i].sizes[size] for i in drawn}
    y = {i: min(measures.shown[i], top) for i in drawn}
    for chosen in rivals(points, measures.metric):
        own = [i for i in chosen if i in x]
        front = _front(points, measures, size, own)
        panel.step(
            [x[i] for i in front], [y[i] for i in front], where="post", color="0.75", linewidth=3, zorder=1
        )
        for bits in sorted({points[i].bits for i in own}):
            line = _front(points, measures, size, [i for i in own if points[i].bits == bits])
            panel.plot([x[i] for i in line], [y[i] for i in line], zorder=2, linewidth=1, **_look(bits))
    for i in drawn:
        edge = {"markerfacecolor": "none"} if measures.shown[i] > top else {}
        colour, marker = _look(points[i].bits)["color"], _marker(points, points[i])
        panel.errorbar(
            x[i],
            y[i],
            yerr=_bars(measures, i, top),
            color=colour,
            marker=marker,
            markersize=3.5,
            markeredgewidth=0.6,
            elinewidth=0.7,
            linestyle="none",
            zorder=3,
            **edge,
        )
    if drawn:  # matplotlib refuses an empty logarithmic axis
        panel.set_xscale("log")
        _ticks(panel.xaxis, max(x.values()) / min(x.values()), prefixes=True)
        if measures.metric != "accuracy":
            panel.set_yscale("log")
            _ticks(panel.yaxis, max(y.values()) / min(y.values()), prefixes=False)
    panel.grid(which="major")
    panel.set_title(SIZES[size], fontsize=8)
    panel.set_xlabel("size as written (bits)")


def _ticks(axis: Any, span: float, prefixes: bool) -> None:
    """Few round numbers, written out (20, 0.1) or with a prefix (500M, 1.5G)."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, NullFormatter

    close = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    subs = close if span < 3 else (1, 1.5, 2, 3, 5, 7) if span < 10 else (1, 2, 5) if span < 80 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(
        EngFormatter(sep="") if prefixes else FuncFormatter(lambda value, _: f"{value:g}")
    )
    axis.set_minor_formatter(NullFormatter())


def _cap(points: Sequence[Point], measures: Measured) -> float:
    """Perplexities of broken models would leave no room for the others."""
    originals = [measures.shown[i] for i, p in enumerate(points) if p.is_original]
    return CAP * max(originals) if measures.metric == "ppl" and originals else math.inf


def _bars(measures: Measured, i: int, top: float) -> Any:
    edges, value = measures.intervals[i], measures.shown[i]
    if edges is None or value > top:
        return None
    return [[max(0.0, value - edges[0])], [max(0.0, min(edges[1], top) - value)]]


def _front(points: Sequence[Point], measures: Measured, size: str, chosen: list[int]) -> list[int]:
    """The cells of `chosen` that no other of them dominates, by size."""
    if not chosen:
        return []
    sizes = torch.tensor([float(points[i].sizes[size]) for i in chosen])
    kept = on_front(sizes, measures.value[chosen])
    return sorted(
        (i for i, k in zip(chosen, kept.tolist(), strict=True) if k), key=lambda i: points[i].sizes[size]
    )


def _look(bits: int) -> dict[str, Any]:
    return {"color": COLOURS.get(bits, "black"), "linestyle": LINES.get(bits, "-")}


def _marked(points: Sequence[Point]) -> list[str]:
    """What markers tell apart: models, or the data types of the only one."""
    models = list(dict.fromkeys(p.model for p in points))
    return models if len(models) > 1 else list(dict.fromkeys(p.type for p in points))


def _marker(points: Sequence[Point], p: Point) -> str:
    names = _marked(points)
    return MARKERS[names.index(p.model if p.model in names else p.type) % len(MARKERS)]


def _legend(figure: Any, points: Sequence[Point], drawn: Sequence[Point]) -> None:
    from matplotlib.lines import Line2D

    widths = sorted({p.bits for p in drawn})
    handles = [Line2D([], [], linewidth=1.2, label=f"{bits} bits", **_look(bits)) for bits in widths]
    for name in _marked(drawn):
        marker = _marker(points, next(p for p in drawn if name in (p.model, p.type)))
        handles.append(Line2D([], [], color="0.3", marker=marker, markersize=4, linestyle="none", label=name))
    handles.append(Line2D([], [], color="0.75", linewidth=3, label="front"))
    figure.legend(handles=handles, loc="outside right center", frameon=False)
