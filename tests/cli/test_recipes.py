"""zq recipes, and that a shortcut is nothing but the name of a shipped recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.command import run
from zq.cli.quantize import SHORTCUTS, _recipe
from zq.recipe import Recipe, load, recipe_folder, shipped


@pytest.mark.parametrize("args", [("recipes",), ("recipes", "list")])
def test_list(args):
    text = run(*args).ok().out
    for name in shipped():
        assert f"--{name}" in text
        assert load(name).about in text


def test_list_json():
    assert run("recipes", "list", "--json").ok().json == [
        {"name": name, "about": load(name).about} for name in sorted(shipped())
    ]


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
    by_flag = _recipe(flags | {name: True}, None, "auto", {}, None)
    by_name = _recipe(flags, name, "auto", {}, None)
    assert by_flag == by_name == shown


def test_options_change_only_what_they_name():
    flags = dict.fromkeys(SHORTCUTS, False) | {"w4a8": True}
    plain = _recipe(flags, None, "auto", {}, None)
    assert _recipe(flags, None, "auto", {}, 3) == replace(plain, seed=3)
    calibrated = _recipe(flags, None, "auto", {"source": "random"}, None)
    assert calibrated == replace(plain, calibration=replace(plain.calibration, source="random"))
    grouped = _recipe(flags, None, "32", {}, None)
    assert [str(rule.scheme) for rule in grouped.rules] == ["int4:g32 @ int8:token"]
    assert grouped == plain.with_group_size(32)
