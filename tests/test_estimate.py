"""The estimate grows with what a recipe asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.quantizers.blocks import recipe
from tests.tiny import save_tiny
from zq.errors import ZqError
from zq.estimate import _per_weight, _trained, _tries, estimate
from zq.methods import METHODS
from zq.plan import make_plan
from zq.quantizers.method import Method
from zq.recipe import Calibration, Recipe, presets, with_preset
from zq.spec import Scheme

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


def variants(method: Method) -> list[dict[str, Any]]:
    """Each option at each value, or at the ends of the range, that its metadata allow."""
    found: list[dict[str, Any]] = [{}]
    for option in fields(method.options):
        values = option.metadata.get("allowed") or option.metadata.get("range") or ()
        values = (False, True) if type(option.default) is bool else values
        found += [{option.name: type(option.default)(value)} for value in values]
    return found


REFUSED = [("lkd", {"batch": 1 << 20}), ("proxy", {"share": 0.0})]
OPTIONS = [(m.name, given) for m in METHODS.values() for given in variants(m)]


def around(name: str, given: dict[str, Any]) -> Recipe:
    """The step where it can stand."""
    step = f"{{{name}: {given}}}"
    if name in ("rtn", "gptq", "lkd-classic"):
        return recipe(RULE, step, samples=9)
    return recipe(RULE, f"rtn, {step}" if name in ("lkd", "lorc") else f"{step}, rtn", samples=9)


@pytest.mark.parametrize(("name", "given"), OPTIONS, ids=str)
def test_every_option_of_every_method_has_a_dry_run(
    name: str, given: dict[str, Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zq.estimate.PROBE", (64, 128))
    if (name, given) in REFUSED:
        with pytest.raises(ZqError, match=r"^recipe:3: .*'(share|batch)"):
            make_plan(tiny("llama"), around(name, given))
    else:
        assert estimate(make_plan(tiny("llama"), around(name, given)))["seconds"] >= 0


def test_combined_options_have_a_dry_run(tiny: Callable[..., Path]) -> None:
    steps = "{rotate: {}}, {proxy: {}}, {gptq: {asymmetry: 0.5, damp: 0.0}}, {lkd: {}}, lorc"
    assert estimate(make_plan(tiny("llama"), recipe(RULE, steps, samples=9)))["seconds"] >= 0


def test_more_kept_columns_than_the_probe_has(tiny: Callable[..., Path]) -> None:
    plan = make_plan(tiny("llama"), recipe(RULE, "{proxy: {}}, {rtn: {}}"))
    assert _per_weight(plan, Scheme.parse("int4:g32:keep=4096")) > 0
