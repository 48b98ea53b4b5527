"""The estimate grows with what a recipe asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.quantizers.blocks import recipe
from tests.tiny import save_tiny
from zq.estimate import _trained, _tries, estimate
from zq.plan import make_plan
from zq.recipe import Calibration, presets, with_preset

RULE = "{match: '*', weights: 'int4:g32', activations: 'int8:token'}"


def test_a_search_for_scales_is_counted(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    steps = ("", "{smoothquant: {}}, ", "{smoothquant: {search: true, windows: 2}}, ", "{awq: {}}, ")
    plans = [make_plan(tmp_path, recipe(RULE, f"{first}{{rtn: {{}}}}")) for first in steps]
    assert [_tries(plan) for plan in plans] == [0, 0, 11 * 2 / 8, 20]
    seconds = [estimate(plan)["seconds"] for plan in plans]
    memory = [estimate(plan)["memory"] for plan in plans]
    assert seconds[3] >= seconds[0]
    assert memory[0] < memory[1] == memory[3]


@pytest.mark.parametrize("name", presets())
def test_every_preset_has_an_estimate(name: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    chosen = with_preset(recipe(RULE, "{rtn: {}}"), name)
    small = Calibration(source="random", samples=6, length=16, generated=chosen.calibration.generated)
    assert estimate(make_plan(tmp_path, replace(chosen, calibration=small)))["seconds"] >= 0


def test_learning_is_counted_by_its_tokens(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    steps = ("{gptq: {}}", "{gptq: {}}, {lkd: {iterations: 10, batch: 2, lookahead: 1}}", "{lkd: classic}")
    plans = [make_plan(tmp_path, recipe(RULE, text)) for text in steps]
    assert [_trained(plan) for plan in plans] == [0, 3 * 2 * 10 * 2 / 8, 3 * 100 * 32 / 8]
    estimate(plans[2])


def test_windows_that_the_model_writes_are_windows(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    chosen = recipe(RULE, "{awq: {windows: 2}}, {rtn: {}}")
    written = replace(chosen, calibration=Calibration(source="none", length=16, generated=4))
    plan = make_plan(tmp_path, written)
    assert (plan.samples, plan.tokens) == (4, 64)
    assert _tries(plan) == 20 * 2 / 4
    estimate(plan)
