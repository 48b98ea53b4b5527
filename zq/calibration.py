"""The tokens that run through the blocks: windows of text, and windows that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.job import Job
from zq.checkpoint.reader import Read
from zq.data import beginnings, describe, mixed
from zq.models.sampling import pieces, write_windows
from zq.plan import Plan

KEPT = "generated"


def calibration(
    plan: Plan, read: Read, job: Job, progress: Callable[[dict[str, Any]], None]
) -> tuple[Tensor | None, dict[str, Any]]:
    """(all windows int64 [S, T] or None, facts about them for the report).

    What the model writes is kept in the job, so that a resumed run sees the same tokens.
    """
    wanted = plan.recipe.calibration
    facts: dict[str, Any] = {"source": wanted.source}
    if plan.windows is None:
        return None, facts
    windows = plan.windows
    if wanted.generated:
        written = job.kept(KEPT)
        if written is None:
            written = _write(plan, read, progress)
            job.keep(KEPT, written.to(torch.int32))
        facts["generated"] = describe(written.long())
        windows = mixed(windows, written.long(), plan.recipe.seed)
    return windows, facts | describe(windows)


def _write(plan: Plan, read: Read, progress: Callable[[dict[str, Any]], None]) -> Tensor:
    assert plan.windows is not None
    length, seed = plan.windows.shape[1], plan.recipe.seed
    config = plan.skeleton.config
    count = plan.recipe.calibration.generated * pieces(length)[0]
    begun = beginnings(plan.windows, count, config.vocab_size, config.bos_token_id, seed)
    return write_windows(
        plan.skeleton, read, begun, length, seed, lambda done, of: progress({"written": done, "of": of})
    )
