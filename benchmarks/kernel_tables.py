"""Tables and the roofline of what benchmarks/kernels.py measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tables

Document = dict[str, Any]


def markdown(document: Document) -> str:
    """Products: microseconds by M, a table for each shape. Activations: the share of the bandwidth of a copy
    of the same size. Ceilings: operations per second."""
    where = document["environment"]
    head = (
        f"{where['device']}, torch {where['torch']}, NVRTC {where['nvrtc']}, commit {document['commit']}.\n"
    )
    parts = [head]
    rows = document["rows"]
    shapes = dict.fromkeys((row["n"], row["k"]) for row in rows if row["table"] == "products")
    for n, k in shapes:
        chosen = [row for row in rows if row["table"] == "products" and (row["n"], row["k"]) == (n, k)]
        parts.append(f"Microseconds, N={n} K={k}\n\n" + _by_tokens(chosen, lambda row: f"{row['us']:.1f}"))
        sustained = _by_tokens(chosen, lambda row: f"{row['sustained_us']:.1f}")
        parts.append(f"Microseconds, sustained, N={n} K={k}\n\n{sustained}")
    activations = [row for row in rows if row["table"] == "activations"]
    for k in dict.fromkeys(row["k"] for row in activations):
        chosen = [row for row in activations if row["k"] == k]
        copies = {row["m"]: bandwidth(row) for row in chosen if row["kernel"] == "copy"}

        def cell(row: dict[str, Any], copies: dict[int, float] = copies) -> str:
            if row["kernel"] == "copy":
                return f"{bandwidth(row) / 1e9:.0f} GB/s"
            return f"{row['us']:.1f} us, {100 * bandwidth(row) / copies[row['m']]:.0f} %"

        parts.append(f"Share of the bandwidth of a copy, K={k}\n\n" + _by_tokens(chosen, cell))
    ceilings = [row for row in rows if row["table"] == "ceiling"]
    if ceilings:
        lines = [[row["kernel"], f"{rate(row) / 1e12:.0f}"] for row in ceilings]
        parts.append("Tensor cores alone\n\n" + tables.markdown(["instruction", "TOPS"], lines))
    return "\n".join(parts)


def _by_tokens(rows: list[dict[str, Any]], cell: Any) -> str:
    ms = list(dict.fromkeys(row["m"] for row in rows))
    lines = []
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        by_m = {row["m"]: cell(row) for row in rows if row["kernel"] == kernel}
        lines.append([kernel, *(by_m.get(m, "–") for m in ms)])
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


def plot(document: Document, image: Path) -> None:
    """Operations per second by operations per byte, one line per kernel and shape, under the measured
    roofs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    products = [row for row in document["rows"] if row["table"] == "products"]
    for kernel in dict.fromkeys(row["kernel"] for row in products):
        chosen = sorted(
            (row for row in products if row["kernel"] == kernel), key=lambda r: (r["n"], r["k"], r["m"])
        )
        x = [row["operations"] / row["bytes"] for row in chosen]
        axes.plot(x, [rate(row) / 1e12 for row in chosen], "o", markersize=4, label=kernel)
    memory, flat = roofs(document)
    if memory and products:
        intensities = [row["operations"] / row["bytes"] for row in products]
        x = [min(intensities), max(intensities)]
        axes.plot(x, [value * memory / 1e12 for value in x], "k-", linewidth=1, label="memory, as a copy")
    for kind, value in flat.items():
        axes.axhline(value / 1e12, linestyle="--", linewidth=1, color="gray", label=kind)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="TOPS")
    axes.set_title(f"{document['environment']['device']}, commit {document['commit']}")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(image, dpi=150)
    pyplot.close(figure)
