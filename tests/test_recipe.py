"""Recipes: strict YAML in, the same recipe out, and errors that name file and line."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.test_spec import schemes
from zq.errors import ZqError
from zq.methods import resolve
from zq.recipe import Bits, Calibration, Recipe, Rule, Step, load, shipped, source_text, with_preset

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
globs = st.one_of(
    st.sampled_from(["*", "@mlp", "@attention", "re:.*down_proj", "re:a{1,2}", "x: y", "# no", "[a]*"]),
    text.filter(lambda t: not t.startswith(("@", "re:"))),
)
values = st.one_of(st.booleans(), st.integers(-9, 9), st.floats(-9, 9), text)
stored = schemes.filter(lambda scheme: not (scheme.weights.rank or scheme.weights.kept))
of_rules = st.one_of(st.none(), stored)
recipes = st.builds(
    Recipe,
    name=text,
    about=text,
    rules=st.lists(st.builds(Rule, globs, of_rules), min_size=1, max_size=4).map(tuple),
    steps=st.lists(
        st.builds(
            Step,
            text,
            st.dictionaries(text, values, max_size=3).map(lambda d: tuple(sorted(d.items()))),
        ),
        min_size=1,
        max_size=3,
    ).map(tuple),
    calibration=st.builds(
        Calibration, source=text, samples=st.integers(1, 9999), length=st.integers(1, 9999)
    ),
    seed=st.integers(0, 2**63 - 1),
    format=st.sampled_from(["auto", "compressed-tensors", "zq"]),
    bits=st.none()
    | st.builds(
        Bits,
        mean=st.floats(1, 32),
        widths=st.lists(st.integers(2, 8), unique=True, max_size=4).map(tuple),
    ),
)


@given(recipes)
def test_a_recipe_survives_its_text(recipe: Recipe) -> None:
    again = Recipe.parse(str(recipe))
    assert again == recipe
    assert str(again) == str(recipe)
    assert again.digest == recipe.digest


def test_the_digest_follows_what_matters_and_nothing_else() -> None:
    base = load("w4a8")
    assert replace(base, name="other", about="else").digest == base.digest
    others = [
        replace(base, seed=1),
        replace(base, bits=Bits(mean=4.5)),
        replace(base, bits=Bits(mean=4.5, widths=(4, 8))),
        replace(base, rules=(*base.rules[:-1], replace(base.rules[-1], match="@mlp"))),
        replace(base, steps=(Step("rtn", (("scale", "absmax"),)),)),
        replace(base, calibration=Calibration(samples=9)),
        replace(base, format="zq"),
        base.with_group_size(32),
    ]
    assert len({r.digest for r in [base, *others]}) == 9


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_whole(name: str) -> None:
    recipe = load(name)
    assert recipe.name == name
    assert recipe.about.endswith(".")
    assert Recipe.parse(str(recipe)) == recipe
    for step in recipe.steps:
        resolve(step, name)
    assert source_text(name)[0].startswith("# "), "a shipped recipe says first what it is for"
    assert recipe.rule_for("lm_head", None) is None


def test_the_shortcuts_of_the_command_line_are_all_shipped() -> None:
    assert {
        "w8a8",
        "w4a8",
        "w4a8-two-level",
        "w4a16",
        "w8a16",
        "fp8",
        "fp8-block",
        "w4afp8",
        "w4w8a8",
    } <= set(shipped())


def test_the_first_rule_that_matches_wins() -> None:
    recipe = Recipe.parse(
        """
rules:
  - {match: '*.down_proj', skip: true}
  - {match: 're:.*\\.0\\..*', weights: 'int8:channel'}
  - {match: '@attention', weights: 'int4:g32'}
  - {match: '*', weights: 'int4:g64'}
  - {match: 'lm_head', weights: 'int8:tensor'}
"""
    )

    def scheme(name: str, kind: str | None) -> str:
        rule = recipe.rule_for(name, kind)
        return "none" if rule is None else str(rule.scheme or "skip")

    assert scheme("model.layers.0.mlp.down_proj", "mlp") == "skip"
    assert scheme("model.layers.0.mlp.up_proj", "mlp") == "int8:channel"
    assert scheme("model.layers.1.self_attn.q_proj", "attention") == "int4:g32"
    assert scheme("model.layers.1.mlp.up_proj", "mlp") == "int4:g64"
    assert scheme("lm_head", None) == "int8:tensor"
    assert scheme("pooler.dense", None) == "none"  # '*' does not reach outside of the blocks
    assert scheme("model.layers.1.MLP.Down_Proj", "mlp") == "int4:g64"


CATCH_ALL = ["*", "**", "***", "?*", "*?", "[!x]*", "re:.*", "re:.+", "re:.*.*", "re:(.*)", "re:.{1,99}"]
CATCH_ALL += [r"re:[\w.]+", "re:[a-z0-9_.]+", "re:[^ ]*", "re:(?s:.*)", "re:model.*|.*"]


@pytest.mark.parametrize("everything", CATCH_ALL)
def test_a_pattern_for_everything_stays_inside_the_blocks(everything: str) -> None:
    rule = Rule(everything, None)
    assert rule.matches("model.layers.0.mlp.up_proj", "mlp")
    for name in ("lm_head", "pooler.dense", "cls.predictions.transform.dense"):
        assert not rule.matches(name, None)


@pytest.mark.parametrize(
    ("match", "name"),
    [
        *[
            (match, "lm_head")
            for match in ("lm_head", "lm_*", "*head", "l?_head", "re:.*head", "re:(a|lm_.*)")
        ],
        *[(match, "pooler.dense") for match in ("pooler.*", "*.dense", "*pool*", r"re:.*\.dense")],
    ],
)
def test_a_pattern_that_names_a_layer_outside_reaches_it(match: str, name: str) -> None:
    assert Rule(match, None).matches(name, None)


RULES = "rules:\n  - match: '*'\n    weights: int4:g64\n"
BAD = {
    "nothing": ("", 1, "a recipe is a mapping"),
    "a list": ("- 1", 1, "a recipe is a mapping"),
    "no rules": ("name: x", 1, "see `zq recipes show w4a8`"),
    "no YAML": ("rules:\n  - {match: '*'", 2, "not valid YAML"),
    "a tab": ("rules:\n\t- 1", 2, "not valid YAML"),
    "two documents": (RULES + "---\n" + RULES, 4, "not valid YAML"),
    "control character": ("about: \x07", 1, "not valid YAML"),
    "unknown key": (RULES + "stepz: []", 4, "key 'stepz' is unknown; allowed here: name, about"),
    "unknown key in a rule": (
        "rules:\n  - match: a\n    weight: int4:g64",
        3,
        "allowed here: match, weights",
    ),
    "unknown key in calibration": (RULES + "calibration:\n  n: 1", 5, "allowed here: source, samples"),
    "a key twice": (RULES + "seed: 1\nseed: 2", 5, "'seed' is given twice; drop one"),
    "a merge key": (RULES + "<<: {seed: 1}", 4, "unknown"),
    "an alias": ("about: &a x\nname: *a\n" + RULES, 2, "alias '*a' is not allowed"),
    "a recursive alias": ("rules: &a\n  - *a", 2, "alias '*a' is not allowed"),
    "a tag": (RULES + "name: !thing x", 4, "tag '!thing' is not allowed"),
    "a tagged list": ("rules: !thing\n  - match: a", 1, "tag '!thing' is not allowed"),
    "a tagged mapping": (RULES + "calibration: !!python/dict {}", 4, "python/dict' is not allowed"),
    "an object": (RULES + "name: !!python/object/apply:os.system ['true']", 4, "not allowed"),
    "a name": (RULES + "name: !!python/name:os.system ''", 4, "not allowed"),
    "binary": (RULES + "name: !!binary aGk=", 4, "not allowed"),
    "rules no list": ("rules: {match: '*'}", 1, "'rules' must be a list"),
    "rule no mapping": ("rules:\n  - '*'", 1, "a rule is a mapping such as"),
    "no match": ("rules:\n  - weights: int4:g64", 2, "'match' is missing"),
    "no weights": ("rules:\n  - match: '*'", 2, "'weights' is missing"),
    "match no text": ("rules:\n  - match: 3\n    weights: int4:g64", 2, "'match' must be text, not 3"),
    "bad spec": ("rules:\n  - match: '*'\n    weights: int4:g0", 2, "scale layout 'g0' is unknown"),
    "bad activations": ("rules:\n  - {match: '*', weights: int4:g64, activations: int8}", 2, "FORMAT:LAYOUT"),
    "bad kind": ("rules:\n  - {match: '@ffn', weights: int4:g64}", 2, "allowed: @attention, @mlp"),
    "bad regex": ("rules:\n  - {match: 're:(', weights: int4:g64}", 2, "not a regular expression"),
    "skip and weights": ("rules:\n  - {match: '*', skip: true, weights: int4:g64}", 2, "either skips"),
    "skip no bool": ("rules:\n  - {match: '*', skip: 1}", 2, "'skip' must be true or false, not 1"),
    "steps empty": (RULES + "steps: []", 4, "the simplest is: - rtn: {}"),
    "steps no list": (RULES + "steps: rtn", 4, "'steps' must be a list"),
    "step of two": (RULES + "steps:\n  - rtn: {}\n    gptq: {}", 4, "a step is one name with options"),
    "step options": (RULES + "steps:\n  - rtn: 3", 5, "options of step 'rtn' must be a mapping"),
    "seed no number": (RULES + "seed: '3'", 4, "'seed' must be a whole number"),
    "seed bool": (RULES + "seed: true", 4, "'seed' must be a whole number"),
    "seed negative": (RULES + "seed: -1", 4, "'seed' must be from 0"),
    "seed huge": (RULES + f"seed: {2**63}", 4, "'seed' must be from 0"),
    "samples zero": (RULES + "calibration: {samples: 0}", 4, "'samples' must be from 1 to"),
    "length float": (RULES + "calibration: {length: 1.5}", 4, "'length' must be a whole number"),
    "format": (RULES + "format: gguf", 4, "allowed: auto, compressed-tensors, zq"),
    "about a date": ("about: 2024-01-01\n" + RULES, 1, "'about' must be text"),
    "extends unknown": ("extends: w9a9\n", 1, "recipe 'w9a9' is unknown; shipped: "),
}


@pytest.mark.parametrize("name", BAD)
def test_every_mistake_is_named_with_its_line(name: str) -> None:
    body, line, words = BAD[name]
    with pytest.raises(ZqError) as caught:
        Recipe.parse(body, "my.yaml")
    message = str(caught.value)
    assert words in message
    assert "\n" not in message
    if name != "extends unknown":
        assert message.startswith(f"my.yaml:{line}: "), message


def test_extends_puts_its_own_rules_first_and_reaches_one_level(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: w4a8\nseed: 5\nrules:\n  - {match: '*.down_proj', weights: 'int8:channel'}\n")
    recipe, base = load(str(child)), load("w4a8")
    assert recipe.rules[1:] == base.rules
    assert str(recipe.rules[0].scheme) == "int8:channel"
    assert (recipe.name, recipe.seed, recipe.steps) == ("child", 5, base.steps)
    bare = Recipe.parse("extends: w4a8\n")
    assert bare.rules == base.rules
    partial = Recipe.parse("extends: w4a8\ncalibration: {samples: 3}\n")
    assert partial.calibration == replace(base.calibration, samples=3)
    grandchild = f"extends: {child}\n"
    with pytest.raises(ZqError, match=re.escape("only one level is allowed")):
        Recipe.parse(grandchild, "g.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ZqError, match=r"cannot read recipe .*no\.yaml: No such file"):
        load(str(tmp_path / "no.yaml"))
    (tmp_path / "latin.yaml").write_bytes("about: Größe".encode("latin-1"))
    with pytest.raises(ZqError, match="not UTF-8 text"):
        load(str(tmp_path / "latin.yaml"))
    with pytest.raises(ZqError, match=r"shipped: .*w4a8"):
        load("w4a9")


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (Step("gtpq", (), "r.yaml:7"), "r.yaml:7: step 'gtpq' is unknown; allowed: "),
        (
            Step("rtn", (("scal", "mse"),), "r.yaml:7"),
            "r.yaml:7: option 'scal' of step 'rtn' is unknown; allowed: ",
        ),
        (
            Step("lkd", (("optimizer", {"bits": 8}),), "r.yaml:7"),
            "; 'optimizer' belongs to 'lkd-classic': write - lkd-classic: {optimizer: ...}",
        ),
        (Step("gptq", (("seed", 8),)), "importance; 'seed' stands beside 'steps', for all of them"),
        (Step("rtn", (("iterations", 8),)), "'iterations' belongs to 'lkd', 'lkd-classic': write - lkd: {"),
        (
            Step("rtn", (("scale", "max"),), "r.yaml:7"),
            "'scale: max' is not allowed; allowed: absmax, absmax-signed, mse, mse-signed",
        ),
        (Step("rtn", (("rounding", True),)), "'rounding: True' is not allowed"),
    ],
)
def test_steps_are_checked_by_their_method(step: Step, words: str) -> None:
    with pytest.raises(ZqError, match=re.escape(words)):
        resolve(step, "r.yaml")


def test_rules_and_steps_know_their_file_and_line_also_when_inherited(tmp_path: Path) -> None:
    base, child = tmp_path / "base.yaml", tmp_path / "child.yaml"
    base.write_text("\nrules:\n  - {match: '*', weights: 'int4:g64'}\nsteps:\n  - magic: {}\n")
    child.write_text(f"extends: {base}\nrules:\n  - {{match: a, skip: true}}\n")
    recipe = load(str(child))
    assert recipe.where == str(child)
    assert [rule.where for rule in recipe.rules] == [f"{child}:3", f"{base}:3"]
    assert [recipe.inherits(rule) for rule in recipe.rules] == [False, True]
    with pytest.raises(ZqError, match=re.escape(f"{base}:5: step 'magic' is unknown")):
        resolve(recipe.steps[0], recipe.where)
    shipped_child = Recipe.parse("extends: w4a8\n", "c.yaml")
    assert shipped_child.rules[0].where.startswith("recipe w4a8:")
    assert load("w4a8").where == "recipe w4a8"


def test_options_may_be_nested() -> None:
    recipe = Recipe.parse(RULES + "steps:\n  - x: {a: {b: [1, {c: 2}]}}\n")
    assert recipe.steps[0].options == (("a", {"b": [1, {"c": 2}]}),)
    assert Recipe.parse(str(recipe)) == recipe


def test_group_size_replaces_every_group_and_only_groups() -> None:
    recipe = Recipe.parse(
        "rules:\n  - {match: a, weights: 'int4:gauto'}\n  - {match: b, weights: 'int8:channel'}\n"
        "  - {match: c, skip: true}\n  - {match: d, weights: 'int4:b64'}\n"
    ).with_group_size(32)
    assert [str(r.scheme) for r in recipe.rules] == ["int4:g32", "int8:channel", "None", "int4:b64"]


def test_a_budget_in_its_two_forms_inherited_and_refused(tmp_path: Path) -> None:
    rules = "rules: [{match: '*', weights: 'int4:gauto'}]\n"
    assert Recipe.parse(rules).bits is None
    assert Recipe.parse(rules + "bits: 5\n").bits == Bits(mean=5.0)
    long = Recipe.parse(rules + "bits: {mean: 4.25, widths: [3, 4, 8]}\n", where="r.yaml")
    assert long.bits == Bits(mean=4.25, widths=(3, 4, 8))
    assert long.bits
    assert long.bits.where == "r.yaml:2"
    (tmp_path / "base.yaml").write_text(rules + "bits: 5\n")
    (tmp_path / "own.yaml").write_text("extends: base.yaml\n")
    assert load(str(tmp_path / "own.yaml")).bits == Bits(mean=5.0)
    assert "bits:" not in str(load("w4a16")), "a recipe without a budget has the digest that it always had"
    for wrong in ("yes", "0.5", "33", ".nan", "[4]", "{widths: [4]}", "{mean: many}", "{mean: 4, most: 8}"):
        with pytest.raises(ZqError, match=r"^r\.yaml:2: "):
            Recipe.parse(f"{rules}bits: {wrong}\n", where="r.yaml")
    for wrong in ("[]", "4", "[4, 4]", "[1]", "[9]", "[4.0]", "[true, 4]"):
        with pytest.raises(ZqError, match=r"^r\.yaml:2: 'widths' must be a list of different whole numbers"):
            Recipe.parse(f"{rules}bits: {{mean: 5, widths: {wrong}}}\n", where="r.yaml")


def test_a_preset_in_a_recipe_gives_way_to_what_is_written_beside_it() -> None:
    rules = "rules: [{match: '*', weights: 'int4:g32'}]\n"
    best = with_preset(Recipe.parse(rules), "best")
    assert Recipe.parse(rules + "preset: best") == best
    assert Recipe.parse("extends: w4a8\npreset: best").steps == best.steps
    mixed = Recipe.parse(rules + "preset: best\nsteps: [rtn]\ncalibration: {samples: 3}")
    assert mixed.steps == (Step("rtn"),)
    assert mixed.calibration == replace(best.calibration, samples=3)
