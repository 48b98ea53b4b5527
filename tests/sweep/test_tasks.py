"""What zq asks of lm-eval and makes of its answer, with a stand-in of its shape."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from typing import Any

import pytest

from zq.errors import ZqError
from zq.sweep.tasks import accuracies, check_tasks

SAMPLES = {
    "piqa": [{"doc_id": 1, "acc": 0.0, "acc_norm": 1.0}, {"doc_id": 0, "acc": 1.0, "acc_norm": 0.0}],
    "lambada": [{"doc_id": 0, "acc": 1.0, "perplexity": 3.0}],
    "odd": [{"doc_id": 0, "bleu": 1.0}],
}


@pytest.fixture
def harness(monkeypatch) -> dict[str, Any]:
    asked: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **options: Any) -> None:
            asked["model"] = options

    class TaskManager:
        all_tasks = (*SAMPLES, "far")

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        asked["call"] = options
        return {"samples": {task: SAMPLES[task] for task in options["tasks"]}}

    def get_task_dict(names: list[str], manager: object) -> None:
        if names == ["far"]:
            raise ConnectionError("Couldn't reach the hub\nand more")

    modules = {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager, "get_task_dict": get_task_dict},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, content in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return asked


def test_scores_of_each_example_in_order(harness):
    found = accuracies("model", "tokenizer", ["piqa", "lambada"], 7)
    assert found == {"piqa": [0.0, 1.0], "lambada": [1.0]}
    assert harness["model"]["pretrained"] == "model"
    call = harness["call"]
    assert (call["limit"], call["num_fewshot"], call["log_samples"]) == (7, 0, True)


def test_a_task_without_an_accuracy(harness):
    with pytest.raises(ZqError, match="'odd' has no accuracy"):
        accuracies("model", "tokenizer", ["odd"], None)


def test_tasks_are_checked_before_any_work(harness):
    check_tasks(["piqa", "lambada"])
    assert os.environ["HF_DATASETS_OFFLINE"] == "1"
    with pytest.raises(ZqError, match="no task 'nope'"):
        check_tasks(["nope"])
    with pytest.raises(ZqError, match=r"'far' cannot be read here \(Couldn't reach the hub\)"):
        check_tasks(["far"])


def test_without_the_package(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ZqError, match="pip install lm-eval"):
        check_tasks(["piqa"])
