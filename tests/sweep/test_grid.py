"""The grid: every combination once, what does not exist named, recipes that say what the cell says."""

from __future__ import annotations

import pytest

from zq.errors import ZqError
from zq.formats import FORMATS
from zq.recipe import Recipe, load
from zq.spec import TensorSpec
from zq.sweep.grid import (
    BITS,
    FAMILIES,
    NEAREST,
    Cell,
    blocks,
    data_types,
    format_of,
    grid,
    method_of,
    recipe_of,
    whole_numbers,
)


def test_every_combination_is_a_cell_or_is_skipped_with_its_reason():
    cells, skipped = grid(["a", "b"], [2, 3, 4], ["int", "nf", "e2m1paper"], ["64", "channel"], [0, 1])
    per_model = [cell for cell in cells if cell.model == "a"]
    assert {cell.spec for cell in per_model} == {
        *("int2:b64", "int2:channel", "int3:b64", "int3:channel", "int4:b64", "int4:channel"),
        *("nf3:b64", "nf3:channel", "nf4:b64", "nf4:channel", "e2m1paper:b64", "e2m1paper:channel"),
    }
    assert len(per_model) == 12 * 2  # seeds
    assert [cell.spec for cell in cells if cell.model == "b"] == [cell.spec for cell in per_model]
    assert {(s.what, s.why) for s in skipped} == {
        ("nf of 2 bits", "nf has 3, 4, 5, 6, 7, 8 bits"),
        ("e2m1paper of 2 bits", "e2m1paper has 4 bits"),
        ("e2m1paper of 3 bits", "e2m1paper has 4 bits"),
    }


def test_one_format_under_two_names_is_measured_once_and_said():
    cells, skipped = grid(["a"], [4], ["float", "e2m1fn"], ["64", "b64"], [0])
    assert [str(cell) for cell in cells] == ["a e2m1fn:b64"]
    assert [s.why for s in skipped if s.what == "e2m1fn 4 64"] == ["it is e2m1fn:b64, as float 64 is"]
    assert len(skipped) == 3


def test_formats_without_a_sign_are_no_weights():
    cells, skipped = grid(["a"], [4], ["udynamic4"], ["64"], [0])
    assert cells == []
    assert "no negative values" in skipped[0].why


@pytest.mark.parametrize("family", FAMILIES)
def test_the_formats_of_a_family_have_its_width(family):
    for bits in BITS:
        name = format_of(family, bits)
        if name is None:
            assert bits == 2
        else:
            assert FORMATS[name].bits == bits
    assert format_of(family, 9) is None


def test_floats():
    """OCP's where there are some; the scaling laws' figures have 3 exponent bits, and 2 at 3 bits."""
    assert [format_of("float", k) for k in (4, 6, 8)] == ["e2m1fn", "e2m3fn", "e4m3fn"]
    assert [format_of("float-paper", k) for k in (3, 4, 5, 8)] == [
        *("e2m0paper", "e3m0paper", "e3m1paper", "e3m4paper")
    ]


def test_a_recipe_says_what_the_cell_says():
    recipe = recipe_of(Cell("a", 4, "quantile", "64", 7, "quantile4:b64"))
    assert [str(rule.scheme) for rule in recipe.rules] == ["quantile4:b64"]
    assert (recipe.format, recipe.seed, recipe.calibration.source) == ("zq", 7, "none")
    assert recipe.steps == NEAREST.steps
    assert Recipe.parse(str(recipe)) == recipe


def test_a_base_recipe_keeps_everything_but_the_weights():
    base = Recipe.parse(
        "rules: [{match: '*.0.*', skip: true},\n"
        "        {match: '*', weights: 'int8:g32', activations: 'int8:token'}]\n"
        "steps: [gptq: {}]\ncalibration: {samples: 3}\n"
    )
    recipe = recipe_of(Cell("a", 3, "nf", "128", 1, "nf3:b128"), base)
    assert [rule.scheme and str(rule.scheme) for rule in recipe.rules] == [None, "nf3:b128 @ int8:token"]
    assert (recipe.steps, recipe.calibration) == (base.steps, base.calibration)


def test_methods_differ_where_their_cells_would():
    base = load("w4a16")
    assert method_of(NEAREST) == "rtn scale=absmax"
    assert method_of(base) != method_of(load("w4a8"))
    wider = Recipe.parse(str(base).replace("int4", "int8"))
    assert method_of(base) == method_of(wider), "the weights of the base are never used"


@pytest.mark.parametrize("text", ["", "4,", "4,4", "4,x", "1", "9", "4.5", "-4"])
def test_bad_numbers(text):
    with pytest.raises(ZqError, match="--bits"):
        whole_numbers("--bits", text, 2, 8)


def test_good_options():
    assert whole_numbers("--bits", "3, 4,8", 2, 8) == [3, 4, 8]
    assert data_types("int,e3m0paper") == ["int", "e3m0paper"]
    assert blocks("64,channel,g32,rank1") == ["64", "channel", "g32", "rank1"]


@pytest.mark.parametrize("text", ["int9", "floats", "int,,nf"])
def test_bad_types(text):
    with pytest.raises(ZqError, match="--types"):
        data_types(text)


@pytest.mark.parametrize("text", ["1", "row", "token", "gauto", "64,64"])
def test_bad_blocks(text):
    with pytest.raises(ZqError, match="--blocks"):
        blocks(text)


def test_every_spec_of_a_large_grid_is_a_spec():
    cells, _ = grid(["a"], BITS, FAMILIES, ["64", "channel", "tensor", "rank1", "g32"], [0])
    for cell in cells:
        assert cell.spec is not None
        assert TensorSpec.parse(cell.spec).bits == cell.bits
