"""Every row of the tables is a recipe that zq takes, and says what its name says."""

from __future__ import annotations

from dataclasses import fields

import pytest
import rows
from rows import LKD, SCHEMES, Tokens, ablation_rows, method_rows, scale_rows

from zq.methods import METHODS, resolve_all

TOKENS = Tokens()
ALL = [*method_rows(TOKENS), *scale_rows(), *(r for s in SCHEMES for r in ablation_rows(TOKENS, s))]


def options(row: rows.Row) -> tuple:
    recipe = row.recipe(0, rows.TEXT)
    return tuple((method.name, chosen) for method, chosen in resolve_all(recipe)), recipe.calibration


@pytest.mark.parametrize("row", ALL, ids=lambda row: row.name)
def test_every_row_is_a_recipe(row):
    recipe = row.recipe(7, "some/where.txt")
    assert recipe.seed == 7
    assert resolve_all(recipe)
    assert recipe.calibration.source == ("some/where.txt" if row.calibrated else "none")


def test_names_are_different():
    assert len({row.name for row in ALL}) == len(ALL)


def test_methods_of_each_scheme():
    common = ["rtn", "gptq", "awq", "lkd as published", "lkd, text only", "lkd"]
    for scheme, (weights, activations) in SCHEMES.items():
        mine = [row for row in method_rows(TOKENS) if row.scheme == scheme]
        smoothed = ["smoothquant", "smoothquant, gptq", "awq, gptq"]
        expected = {*common, *(smoothed if activations else [])} & set(
            rows.FEW.get(scheme, (*common, *smoothed))
        )
        assert [r.method for r in mine if r.method in common] == [m for m in common if m in expected]
        assert {row.method for row in mine} == expected
        for row in mine:
            (rule,) = row.recipe(0, "").rules
            assert (str(rule.scheme.weights), rule.scheme.activations and str(rule.scheme.activations)) == (
                weights,
                activations,
            )
            assert row.recipe(0, "").calibration.generated == (896 if row.method.endswith("lkd") else 0)


def test_an_ablation_changes_one_thing_and_repeats_nothing():
    base, *others = [options(row) for row in ablation_rows(TOKENS, "w3 g64")]
    assert base == options(next(r for r in method_rows(TOKENS) if r.name == "methods w3 g64 lkd"))
    assert len({repr(found) for found in (base, *others)}) == len(others) + 1
    for steps, calibration in others:
        if len(steps) == len(base[0]):
            differing = [a != b for a, b in zip(steps, base[0], strict=True)]
            assert sum(differing) + (calibration != base[1]) == 1


def test_every_option_of_lkd_has_a_row():
    """But `checks`, which only says how often the held-out windows are looked at."""
    switched = {option for step, option, _ in rows.SWITCHES if step == "lkd"}
    assert switched == {f.name for f in fields(METHODS["lkd"].options)} - {"checks"}


def test_the_ablation_follows_the_default(monkeypatch):
    changed = [*LKD[:-1], {"lkd": {"iterations": 200, "lookahead": 1}}]
    monkeypatch.setattr(rows, "LKD", changed)
    names = [row.method for row in ablation_rows(TOKENS, "w4a16 g64")]
    assert "iterations 400" in names
    assert "iterations 200" not in names
    assert "lookahead 0" in names
    assert "lookahead 1" not in names


def test_an_option_that_does_not_exist_is_seen(monkeypatch):
    monkeypatch.setattr(rows, "SWITCHES", (("lkd", "no_such_option", (1,)),))
    with pytest.raises(AttributeError):
        list(ablation_rows(TOKENS, "w4a16 g64"))
