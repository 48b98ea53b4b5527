"""What a sweep found, in words and tables: which width is best at each budget, in how many resamples.

Which cells compete: KL is a distance from a model's own original, so only cells of one model have theirs
compared; perplexities are compared between models that see the same tokens, accuracies between all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zq.sweep.front import RESAMPLES, best_within, budgets, on_front, shares
from zq.sweep.points import METRICS, SIZES, Measured, Point, as_table, measured, points
from zq.sweep.store import Row

DECIDED = 0.95
CAVEAT = (
    "Shares are of bootstrap resamples of the windows measured here: they say nothing about other texts, "
    "models, data types or ways to round."
)

FEWEST = 8  # windows; intervals from fewer are too narrow
NO_ACCURACY = (
    "Accuracy was not measured. To add it, sweep into another -o with --tasks lambada_openai,piqa; the "
    "package lm-eval and the data of the tasks must be on this machine."
)


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """{"setting", "cells", "contests", "findings"}: plain lists, dicts, numbers and strings."""
    found = points(rows)
    by = metrics(found)
    contests = [
        contest(found, measures, chosen, size)
        for metric, measures in by.items()
        for chosen in rivals(found, metric)
        for size in SIZES
    ]
    return {
        "setting": rows[-1]["setting"],
        "resamples": RESAMPLES,
        "models": _models(found),
        "cells": as_table(found, by),
        "contests": contests,
        "findings": [*(_sentence(each) for each in contests), *_caveats(rows[-1]["setting"])],
    }


def _caveats(setting: dict[str, Any]) -> list[str]:
    """What the figures do not say."""
    windows = setting["windows"]
    many = "1 window is" if windows == 1 else f"{windows} windows are"
    few = f"{many} few: below {FEWEST} believe neither intervals nor shares."
    return [few] * (windows < FEWEST) + [CAVEAT] + [NO_ACCURACY] * (not setting["tasks"])


def metrics(found: Sequence[Point]) -> dict[str, Measured]:
    """The metrics that every point has."""
    accuracy = {"accuracy": measured(found, "accuracy")} if all(p.tasks for p in found) else {}
    return {"kl": measured(found, "kl"), "ppl": measured(found, "ppl"), **accuracy}


def rivals(found: Sequence[Point], metric: str) -> list[list[int]]:
    """Groups of points whose values of this metric can be compared, as indices."""
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(found):
        group = {"kl": p.identity, "ppl": p.tokens}.get(metric, "")
        groups.setdefault(group, []).append(i)
    return list(groups.values())


def contest(found: Sequence[Point], measures: Measured, chosen: list[int], size: str) -> dict[str, Any]:
    """The front of the points `chosen` and the winner at each budget, by bytes of the kind `size`."""
    sizes = torch.tensor([found[i].sizes[size] for i in chosen], dtype=torch.float64)
    value, means = measures.value[chosen], measures.means[:, chosen]
    decided = measures.intervals[chosen[0]] is not None
    front, often = on_front(sizes, value), on_front(sizes, means).double().mean(0)
    bits = [found[i].bits for i in chosen]
    table = []
    for budget in budgets(sizes):
        best = chosen[int(best_within(sizes, value, budget))]
        won = shares(best_within(sizes, means, budget), bits)
        table.append(
            {
                "budget": budget,
                "cell": best,
                "bits": found[best].bits,
                "value": measures.shown[best],
                "interval": measures.intervals[best],
                "shares": won if decided else None,
            }
        )
    return {
        "metric": measures.metric,
        "size": size,
        "models": list(dict.fromkeys(found[i].model for i in chosen)),
        "cells": len(chosen),
        "front": [
            {"cell": i, "share": often[k].item() if decided else None}
            for k, i in enumerate(chosen)
            if front[k]
        ],
        "budgets": table,
    }


def gigabits(size: float) -> str:
    """Bytes as bits for people: 0.905 Gbit."""
    bits = 8 * size
    for unit in ("bit", "kbit", "Mbit", "Gbit"):
        if bits < 1000 and unit != "Gbit":
            return f"{bits:.3g} {unit}"
        if unit != "Gbit":
            bits /= 1000
    return f"{bits:.3g} Gbit" if bits < 1000 else f"{bits / 1000:.3g} Tbit"


def width(bits: int) -> str:
    return f"{bits} bits" + (", the original," if bits >= 16 else "")


def _sentence(each: dict[str, Any]) -> str:
    """Which width wins where, consecutive budgets with one answer taken together."""
    of = each["models"][0] if len(each["models"]) == 1 else f"{len(each['models'])} models"
    start = f"{METRICS[each['metric']]} of {of} by size ({SIZES[each['size']]}), {each['cells']} cells: "
    runs: list[tuple[str, list[dict[str, Any]]]] = []
    for row in each["budgets"]:
        answer = _answer(row)
        if runs and runs[-1][0] == answer:
            runs[-1][1].append(row)
        else:
            runs.append((answer, [row]))
    return start + "; ".join(_run(answer, rows) for answer, rows in runs) + "."


def _answer(row: dict[str, Any]) -> str:
    if row["shares"] is None or row["shares"].get(row["bits"], 0) >= DECIDED:
        return width(row["bits"])
    return "undecided"


def _run(answer: str, rows: list[dict[str, Any]]) -> str:
    low, high = gigabits(rows[0]["budget"]), gigabits(rows[-1]["budget"])
    where = f"at {low}" if len(rows) == 1 else f"from {low} to {high}"
    if rows[0]["shares"] is None:
        return f"{answer} {where} (one window, so nobody knows how surely)"
    named = [rows[0]["bits"]] if answer != "undecided" else sorted({k for row in rows for k in row["shares"]})
    found = [(bits, [row["shares"].get(bits, 0.0) for row in rows]) for bits in named]
    won = ", ".join(f"{width(bits)} {_range(shares)}" for bits, shares in found if max(shares) >= 0.01)
    return f"{answer} {where} ({won if answer == 'undecided' else _range(found[0][1])} of resamples)"


def _range(found: list[float]) -> str:
    low, high = percent(min(found)), percent(max(found))
    return high if low == high else f"{low[:-2]} to {high}"


def percent(share: float) -> str:
    """Rounded down to whole percent, so that 100 % means all."""
    return f"{int(100 * share + 1e-9)} %"


def _models(found: Sequence[Point]) -> list[dict[str, Any]]:
    known = {p.model: p for p in found}
    return [{"name": p.model, "parameters": p.parameters, "identity": p.identity} for p in known.values()]
