"""zq recipes, and that a shortcut is nothing but the name of a shipped recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import run
from zq.cli.quantize import SHORTCUTS, _recipe
from zq.methods import resolve_all
from zq.recipe import Recipe, load, preset_about, preset_text, presets, recipe_folder, shipped, with_preset


@pytest.mark.parametrize("args", [("recipes",), ("recipes", "list")])
def test_list(args):
    text = run(*args).ok().out
    for name in shipped():
        assert f"--{name}" in text
        assert load(name).about in text


def test_list_json():
    listed = run("recipes", "list", "--json").ok().json
    assert {row["name"]: row["about"] for row in listed} == {
        **{name: load(name).about for name in shipped()},
        **{name: preset_about(name) for name in presets()},
    }


@pytest.mark.parametrize("name", shipped())
def test_show_prints_the_file(name):
    file = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert run("recipes", "show", name).ok().out == file
    shown = run("recipes", "show", name, "--json").ok().json
    assert shown == {"name": name, "about": load(name).about, "digest": load(name).digest, "yaml": file}


def test_show_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: w4a8\nseed: 7\n")
    assert run("recipes", "show", path).ok().out == path.read_text()
    assert run("recipes", "show", path, "--json").ok().json["name"] == "mine"


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ("[{magic: {}}]", "mine.yaml:3: step 'magic' is unknown"),
        ("[{rtn: {speed: {fast: 9}}}]", "mine.yaml:3: option 'speed' of step 'rtn' is unknown"),
    ],
)
def test_show_checks_the_steps_too(steps, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(f"extends: w4a8\n# mine\nsteps: {steps}\n")
    for args in ((), ("--json",)):
        done = run("recipes", "show", "mine.yaml", *args)
        assert done.code == 2
        assert f"error: {message}" in done.err


def test_shortcuts_are_exactly_the_shipped_recipes():
    assert sorted(SHORTCUTS) == shipped()
    text = run("quantize", "--help").ok().out
    for name in SHORTCUTS:
        assert f"--{name}" in text


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_shortcut_runs_the_recipe_that_is_shown(name):
    shown = Recipe.parse(run("recipes", "show", name).ok().out, name=name)
    flags = dict.fromkeys(SHORTCUTS, False)
    by_flag = _recipe(flags | {name: True}, None, None, "auto", {}, None)
    by_name = _recipe(flags, name, None, "auto", {}, None)
    assert by_flag == by_name == shown


def test_options_change_only_what_they_name():
    flags = dict.fromkeys(SHORTCUTS, False) | {"w4a8": True}
    plain = _recipe(flags, None, None, "auto", {}, None)
    assert _recipe(flags, None, None, "auto", {}, 3) == replace(plain, seed=3)
    calibrated = _recipe(flags, None, None, "auto", {"source": "random"}, None)
    assert calibrated == replace(plain, calibration=replace(plain.calibration, source="random"))
    grouped = _recipe(flags, None, None, "32", {}, None)
    assert [str(rule.scheme) for rule in grouped.rules] == ["int4:g32 @ int8:token"]
    assert grouped == plain.with_group_size(32)


@pytest.mark.parametrize("name", presets())
def test_a_preset_brings_its_steps_and_calibration(name):
    assert run("recipes", "show", name).ok().out.strip() == preset_text(name).strip()
    assert run("recipes", "show", name, "--json").ok().json["yaml"] == preset_text(name)
    plain = load("w4a8")
    chosen = with_preset(plain, name)
    assert replace(chosen, steps=plain.steps, calibration=plain.calibration) == plain
    flags = {flag: flag == "w4a8" for flag in SHORTCUTS}
    assert _recipe(flags, None, name, "auto", {}, None) == chosen
    assert _recipe(flags, None, name, "auto", {"samples": 3}, None).calibration.samples == 3
    resolve_all(chosen)
