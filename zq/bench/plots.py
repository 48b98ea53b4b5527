"""The figure of a benchmark: bars for each engine over the batch sizes, one panel for each figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zq.bench.results import RATES, TIMES, Row
from zq.errors import ZqError
from zq.sweep.plots import STYLE, is_available

COLOURS = {"zq": "#0072B2", "compiled": "#E69F00", "eager": "#999999"}  # Okabe and Ito (2008)
NAMES = {
    "prefill_ms": "prefill (ms)",
    "ms_per_token": "one token (ms)",
    "ms_per_batch": "batch (ms)",
    "tokens_per_s": "tokens per second",
    "sequences_per_s": "sequences per second",
}


def check_file(file: Path) -> None:
    """Raises ZqError where matplotlib is missing, does not know the kind of file, or cannot write there."""
    if not is_available():
        raise ZqError("--plot needs matplotlib, which is not installed: pip install 'zq[plots]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = file.suffix.removeprefix(".").lower()
    if kind not in kinds:
        raise ZqError(f"--plot {file}: matplotlib draws no '{kind}' here; give a .png, .svg or .pdf")
    if not file.parent.is_dir():
        raise ZqError(f"--plot {file}: there is no folder {file.parent}; make it first")


def draw(rows: Sequence[Row], mode: str, title: str, file: Path) -> None:
    """Write the figure. Rows without figures are left out. Raises ZqError when it cannot be written."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = [row for row in rows if "error" not in row]
    panels = [*TIMES[mode], RATES[mode], "memory"]
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": "zq bench"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(2.4 * len(panels), 2.8), layout="constrained")
        for axes, name in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _bars(axes, rows, name)
        figure.suptitle(title, fontsize=9)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        try:
            figure.savefig(file, dpi=200)
        except OSError as error:
            raise ZqError(f"--plot {file}: cannot be written ({error.strerror}); give another file") from None


def _bars(axes: Any, rows: Sequence[Row], name: str) -> None:
    engines = list(dict.fromkeys(row["engine"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    width = 0.8 / max(1, len(engines))
    for place, engine in enumerate(engines):
        own = {row["batch"]: _value(row, name) for row in rows if row["engine"] == engine}
        x = [batches.index(batch) + (place - (len(engines) - 1) / 2) * width for batch in own]
        bars = axes.bar(x, list(own.values()), width, color=COLOURS[engine], label=engine)
        axes.bar_label(bars, fmt="%.3g", fontsize=5, padding=1)
    axes.set_xticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set_xlabel("batch")
    axes.set_title("peak memory (GB)" if name == "memory" else NAMES[name], fontsize=8)
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _value(row: Row, name: str) -> float:
    return (row["memory"]["peak"] or 0) / 1e9 if name == "memory" else row[name]
