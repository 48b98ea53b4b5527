"""How long a cell will take: `zq.estimate` for quantizing, a timed matrix product for measuring."""

from __future__ import annotations

import math
from typing import Any

from zq.estimate import estimate, per_operation
from zq.plan import Plan
from zq.sweep.grid import Cell


def seconds(plan: Plan, cell: Cell, setting: dict[str, Any]) -> float:
    """Of one cell on the device of the plan; `setting` says how many tokens. Tasks of lm-eval are not
    counted."""
    weights = sum(math.prod(row["shape"]) for row in plan.rows())
    measuring = 2 * weights * setting["windows"] * setting["length"] * per_operation(plan)
    return measuring + (estimate(plan)["seconds"] if cell.spec else 0.0)
