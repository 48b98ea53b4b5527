"""Zero-shot accuracy by the Language Model Evaluation Harness, where its package and data are installed.

https://github.com/EleutherAI/lm-evaluation-harness (package `lm-eval`). zq downloads nothing for it: the data
must be in the cache of `datasets`, which is told to stay offline.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from zq.errors import ZqError

METRICS = ("acc_norm", "acc", "exact_match")  # the first that a task has


def check_tasks(tasks: list[str]) -> None:
    """Raises ZqError unless the harness is installed and finds every task and its data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ZqError("--tasks needs the package lm-eval; run: pip install lm-eval, or drop --tasks")
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    from lm_eval.tasks import TaskManager, get_task_dict  # type: ignore[import-not-found]

    manager = TaskManager()
    for task in tasks:
        if task not in manager.all_tasks:
            raise ZqError(f"--tasks: lm-eval has no task '{task}'; see lm_eval --tasks list")
        try:
            get_task_dict([task], manager)
        except Exception as error:  # of datasets, of files, of the task's own code: none is a defect of zq
            why = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
            raise ZqError(
                f"--tasks: the data of '{task}' cannot be read here ({why}); put it into the cache of "
                "datasets first, or drop the task"
            ) from None


def accuracies(model: Any, tokenizer: Any, tasks: list[str], limit: int | None) -> dict[str, list[float]]:
    """Task -> 1 or 0 for each of its examples, in order; `limit`: the first so many. No examples are shown to
    the model before. Raises ZqError for a task without an accuracy."""
    from lm_eval import simple_evaluate  # type: ignore[import-not-found]
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=tasks,
        num_fewshot=0,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    return {task: _scores(task, samples) for task, samples in found["samples"].items()}


def _scores(task: str, samples: list[dict[str, Any]]) -> list[float]:
    metric = next((name for name in METRICS if samples and name in samples[0]), None)
    if metric is None:
        raise ZqError(f"--tasks: '{task}' has no accuracy ({', '.join(METRICS)}); drop it")
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [float(sample[metric]) for sample in ordered]
