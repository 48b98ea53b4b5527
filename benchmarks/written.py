"""Windows that the model writes itself: written once for all rows that calibrate on the same ones.

Writing is a third of the time of a row of `lkd` and depends on the model, the text and the seed only. What it
took is measured at the first row and added to every row that would have written.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from protocol import Cost, Setting
from rows import Tokens, method_rows
from torch import Tensor

from zq.calibration import written_windows
from zq.data import mixed
from zq.plan import Plan, make_plan


@dataclass(frozen=True)
class Piece:
    """`tokens` int64 [windows, length]; what writing them cost, as Cost.to_dict says it."""

    tokens: Tensor
    cost: dict[str, Any]


class Written:
    """By text, seed and count; of one model on one device."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, int, int], Piece] = {}

    def of(self, plan: Plan) -> Piece | None:
        """None where the plan wants no written windows."""
        count = plan.recipe.calibration.generated
        if plan.windows is None or not count:
            return None
        text = hashlib.sha256(plan.windows.numpy().tobytes()).hexdigest()
        key = text, plan.recipe.seed, count
        if key not in self._pieces:
            with Cost(str(plan.skeleton.device)) as cost, torch.no_grad():
                tokens = written_windows(plan.windows, plan.recipe, plan.skeleton, plan.view.read)
            self._pieces[key] = Piece(tokens, cost.to_dict())
        return self._pieces[key]


def added(measured: dict[str, Any], piece: Piece) -> dict[str, Any]:
    """A row as if it had written its windows itself: seconds are sums, peaks the larger ones."""
    found = dict(measured)
    found["seconds"] = round(measured["seconds"] + piece.cost["seconds"], 2)
    for key in ("peak_gpu_bytes", "peak_rss_bytes"):
        if measured[key] is not None:
            found[key] = max(measured[key], piece.cost[key])
    windows = measured["seconds_of"]["windows"] + piece.cost["seconds"]
    found["seconds_of"] = measured["seconds_of"] | {"windows": round(windows, 2)}
    return found


def default_windows(where: Setting, text: str, tokens: Tokens, seed: int) -> tuple[Tensor, Piece]:
    """(what the row `lkd` calibrates on, int64 [samples + generated, length]; the written part).

    `text` is the path of the calibration text.
    """
    row = next(r for r in method_rows(tokens) if r.name == "methods w4a16 g64 lkd")
    plan = make_plan(where.folder, row.recipe(seed, text), device=where.device)
    assert plan.windows is not None
    if not torch.equal(plan.windows, where.calibration):
        raise SystemExit("zq's windows of text are not the protocol's")
    piece = Written().of(plan)
    assert piece is not None
    return mixed(plan.windows, piece.tokens, seed), piece


def with_written(plan: Plan, piece: Piece | None) -> Plan:
    return plan if piece is None else replace(plan, written=piece.tokens)
