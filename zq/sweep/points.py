"""From the rows of results.jsonl to what is drawn and compared: one point per model and scheme."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zq.sweep.front import interval, resampled
from zq.sweep.store import Row

METRICS = {"kl": "KL divergence", "ppl": "perplexity", "accuracy": "zero-shot accuracy"}
SIZES = {"all": "all weights", "blocks": "without embeddings and head"}


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model as stored (`spec` "original") or quantized, with its values per window; means over seeds.

    sizes: bytes by the keys of SIZES. tasks: name -> score of each example.
    """

    model: str
    identity: str
    parameters: int
    bits: int
    type: str
    block: str
    spec: str
    seeds: int
    sizes: dict[str, int]
    bits_per_weight: float
    tokens: str
    kl: tuple[float, ...]
    nll: tuple[float, ...]
    top1: float
    tasks: dict[str, tuple[float, ...]]

    @property
    def is_original(self) -> bool:
        return self.spec == "original"


def points(rows: Sequence[Row]) -> list[Point]:
    """Models from the smallest to the largest, their cells by size."""
    groups: dict[tuple[str, str], list[Row]] = {}
    names: dict[str, set[str]] = {}
    for row in {row["key"]: row for row in rows}.values():
        model = row["model"]
        groups.setdefault((model["identity"], row["cell"]["spec"] or "original"), []).append(row)
        names.setdefault(model["name"], set()).add(model["identity"])
    found = []
    for (identity, spec), same in groups.items():
        first = same[-1]
        name = first["model"]["name"]
        found.append(
            Point(
                model=name if len(names[name]) == 1 else f"{name} ({identity[:6]})",
                identity=identity,
                parameters=first["model"]["parameters"]["all"],
                bits=first["cell"]["bits"],
                type=first["cell"]["type"],
                block=first["cell"]["block"],
                spec=spec,
                seeds=len(same),
                sizes=first["bytes"],
                bits_per_weight=first["bits_per_weight"],
                tokens=first["tokens"],
                kl=_mean([row["kl_windows"] for row in same]),
                nll=_mean([row["nll_windows"] for row in same]),
                top1=sum(row["top1_agreement"] for row in same) / len(same),
                tasks={task: _mean([row["tasks"][task] for row in same]) for task in first.get("tasks", {})},
            )
        )
    return sorted(found, key=lambda p: (p.parameters, p.model, p.sizes["all"], p.spec))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A metric of N points: `value` [N], its bootstrap means [R, N], both such that less is better, and for
    people `shown` [N] with intervals (None from a single window)."""

    metric: str
    value: Tensor
    means: Tensor
    shown: list[float]
    intervals: list[tuple[float, float] | None]


def measured(points: Sequence[Point], metric: str) -> Measured:
    """`metric` is a key of METRICS. The windows of a resample are the same for all points."""
    if metric == "accuracy":
        parts = [torch.tensor([p.tasks[task] for p in points]) for task in points[0].tasks]
    else:
        parts = [torch.tensor([p.kl if metric == "kl" else p.nll for p in points], dtype=torch.float64)]
    mean = sum(part.double().mean(1) for part in parts) / len(parts)
    means = sum(resampled(part, seed=i) for i, part in enumerate(parts)) / len(parts)
    assert isinstance(mean, Tensor)
    assert isinstance(means, Tensor)
    decided = all(part.shape[1] > 1 for part in parts)
    edges = [interval(means[:, i]) if decided else None for i in range(len(points))]
    if metric == "ppl":
        shown = [math.exp(value) for value in mean.tolist()]
        edges = [edge and (math.exp(edge[0]), math.exp(edge[1])) for edge in edges]
    else:
        shown = mean.tolist()
    sign = -1 if metric == "accuracy" else 1
    return Measured(metric=metric, value=sign * mean, means=sign * means, shown=shown, intervals=edges)


def _mean(values: list[list[float]]) -> tuple[float, ...]:
    return tuple(sum(column) / len(values) for column in zip(*values, strict=True))


def as_table(points: Sequence[Point], by: dict[str, Measured]) -> list[dict[str, Any]]:
    """One record per point: what it is, its sizes, each metric with its interval."""
    rows = []
    for i, p in enumerate(points):
        record: dict[str, Any] = {
            "model": p.model,
            "bits": p.bits,
            "type": p.type,
            "block": p.block,
            "spec": p.spec,
            "seeds": p.seeds,
            "bytes": p.sizes,
            "bits_per_weight": p.bits_per_weight,
            "top1_agreement": p.top1,
        }
        for metric, found in by.items():
            record[metric] = found.shown[i]
            record[f"{metric}_interval"] = found.intervals[i]
        rows.append(record)
    return rows
