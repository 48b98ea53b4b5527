"""Tables and the roofline of what benchmarks/kernels.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tables

Document = dict[str, Any]


BASE = "cuBLAS bf16"


def products(document: Document) -> str:
    """Microseconds by M, a table for each shape; in brackets how many times faster than cuBLAS in bf16."""
    rows = [row for row in document["rows"] if row["table"] == "products"]
    parts = []
    for n, k in dict.fromkeys((row["n"], row["k"]) for row in rows):
        chosen = [row for row in rows if (row["n"], row["k"]) == (n, k)]
        base = {row["m"]: row["us"] for row in chosen if row["kernel"] == BASE}

        def cell(row: dict[str, Any], base: dict[int, float] = base) -> str:
            us = f"{row['us']:.{0 if row['us'] >= 100 else 1}f}"
            return us if row["kernel"] == BASE else f"{us} ({base[row['m']] / row['us']:.2f}x)"

        note, mixed = _note(chosen)
        parts.append(f"N={n} K={k}, microseconds{note}:\n\n" + _by_tokens(chosen, cell, mixed))
    return "\n".join(parts) + f"\n{where(document)}\n"


def activations(document: Document) -> str:
    """Microseconds, and the share of the bandwidth of a copy of the same input."""
    rows = [row for row in document["rows"] if row["table"] == "activations"]
    parts = []
    for k in dict.fromkeys(row["k"] for row in rows):
        chosen = [row for row in rows if row["k"] == k]
        copies = {row["m"]: bandwidth(row) for row in chosen if row["kernel"] == "copy"}

        def cell(row: dict[str, Any], copies: dict[int, float] = copies) -> str:
            return f"{row['us']:.1f} ({100 * bandwidth(row) / copies[row['m']]:.0f} %)"

        note, mixed = _note(chosen)
        parts.append(f"K={k}, microseconds (bandwidth){note}:\n\n" + _by_tokens(chosen, cell, mixed))
    return "\n".join(parts) + f"\n{where(document)}\n"


def ceilings(document: Document) -> str:
    """Operations per second of the bare instructions."""
    rows = [row for row in document["rows"] if row["table"] == "ceiling"]
    lines = [[row["kernel"], f"{rate(row) / 1e12:.0f}"] for row in rows]
    return tables.markdown(["instruction", "TOPS"], lines) + f"\n{where(document)}\n"


def where(document: Document) -> str:
    facts = document["environment"]
    text = f"{facts['device']}; torch {facts['torch']}, NVRTC {facts['nvrtc']}, commit {document['commit']}"
    return text + "."


def _note(rows: list[dict[str, Any]]) -> tuple[str, bool]:
    """(what a caption says of a commit that all rows share, whether rows say it themselves)"""
    shared = _commits(rows)
    return f" (commit {shared[0]})" if len(shared) == 1 and shared[0] else "", len(shared) > 1


def _commits(rows: list[dict[str, Any]]) -> list[str | None]:
    """Of rows that stem from a run before the document's; None: of the document's own."""
    return list(dict.fromkeys(row.get("commit") for row in rows))


def _by_tokens(rows: list[dict[str, Any]], cell: Any, mixed: bool = False) -> str:
    ms = list(dict.fromkeys(row["m"] for row in rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        chosen = [row for row in rows if row["kernel"] == kernel]
        by_m = {row["m"]: cell(row) for row in chosen}
        older = "".join(f", at {commit}" for commit in _commits(chosen) if mixed and commit)
        lines.append([kernel + older, *(by_m.get(m, "–") for m in ms)])
    return tables.markdown(["kernel", *(f"M={m}" for m in ms)], lines)


def bandwidth(row: dict[str, Any]) -> float:
    """Bytes per second."""
    return row["bytes"] / (row["us"] * 1e-6)


def rate(row: dict[str, Any]) -> float:
    """Operations per second."""
    return row["operations"] / (row["us"] * 1e-6)


def roofs(document: Document) -> tuple[float, dict[str, float]]:
    """(bytes per second of the fastest copy, operations per second of the best ceiling of each kind)."""
    rows = document["rows"]
    copies = [bandwidth(row) for row in rows if row["kernel"] == "copy"]
    flat: dict[str, float] = {}
    for row in rows:
        if row["table"] == "ceiling":
            kind = row["kernel"].partition(",")[0]
            flat[kind] = max(flat.get(kind, 0.0), rate(row))
    return max(copies, default=0.0), flat


MARKERS = {"cuBLAS": "x", "zq": "o", "humming": "^", "gemlite": "s"}


def plot(document: Document, image: Path) -> None:
    """Operations per second by operations per byte under the measured roofs, a panel for each shape; the
    marker says whose kernel it is, the colour of what scheme."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products = [row for row in document["rows"] if row["table"] == "products"]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in products))
    kernels = list(dict.fromkeys(row["kernel"] for row in products))
    schemes = list(dict.fromkeys(kernel.partition(" ")[2] for kernel in kernels))
    colours = pyplot.get_cmap("tab20").colors  # pyright: ignore[reportAttributeAccessIssue]
    size = (5.5 * len(shapes) + 2.5, 5.5)
    figure, panels = pyplot.subplots(1, len(shapes), figsize=size, squeeze=False, sharey=True)
    memory, flat = roofs(document)
    for axes, (n, k) in zip(panels[0], shapes, strict=True):
        here = [row for row in products if (row["n"], row["k"]) == (n, k)]
        for kernel in kernels:
            chosen = sorted((row for row in here if row["kernel"] == kernel), key=lambda row: row["m"])
            maker, _, scheme = kernel.partition(" ")
            x = [row["operations"] / row["bytes"] for row in chosen]
            y = [rate(row) / 1e12 for row in chosen]
            style = {
                "color": colours[schemes.index(scheme) % len(colours)],
                "marker": MARKERS.get(maker, "d"),
            }
            axes.plot(x, y, linewidth=0.8, markersize=5, label=kernel, **style)
        ends = [f(row["operations"] / row["bytes"] for row in here) for f in (min, max)]
        top = max(flat.values(), default=float("inf"))
        if memory:
            knee = [x for x in (ends[0], min(ends[1], top / memory)) if x]
            axes.plot(knee, [x * memory / 1e12 for x in knee], "k-", linewidth=1, label="memory, as a copy")
        if flat:
            axes.axhline(top / 1e12, linestyle="--", color="black", linewidth=1, label="bare 8-bit wgmma")
        axes.set(xscale="log", yscale="log", xlabel="operations per byte", title=f"N={n} K={k}")
    panels[0][0].set_ylabel("TOPS")
    figure.suptitle(f"{document['environment']['device']}, commit {document['commit']}")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.2 / size[0], 1))
    figure.savefig(image, dpi=110)
    pyplot.close(figure)
