"""The order of steps, and what they need, are checked before any work; the error names the line."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from zq.errors import ZqError
from zq.methods import QUANTIZERS, resolve_all
from zq.plan import make_plan
from zq.recipe import Recipe

TEXT = """
rules: [{match: '*', weights: 'int4:g32'}]
calibration: {source: random, samples: SAMPLES, length: 16}
steps:
"""


def recipe(*steps: str, samples: int = 16) -> Recipe:
    """The first step is in line 5."""
    lines = "".join(f"  - {step}\n" for step in steps)
    return Recipe.parse(TEXT.replace("SAMPLES", str(samples)) + lines)


@pytest.mark.parametrize(
    "steps",
    [
        ["rtn"],
        ["rotate", "smoothquant", "gptq", "lkd"],
        ["awq", "gptq", "lkd", "lorc"],
        ["proxy", "awq", "rtn"],
        ["lkd-classic", "lkd", "lkd"],
        ["lkd-classic", "lorc"],
    ],
    ids=" ".join,
)
def test_what_makes_sense(steps: list[str]) -> None:
    assert [method.name for method, _ in resolve_all(recipe(*(f"{name}: {{}}" for name in steps)))] == steps


@pytest.mark.parametrize(("first", "second"), itertools.product([m.name for m in QUANTIZERS], repeat=2))
def test_a_second_quantizer_would_round_rounded_weights(first: str, second: str) -> None:
    with pytest.raises(ZqError) as caught:
        resolve_all(recipe(f"{first}: {{}}", "lkd: {}", f"{second}: {{}}"))
    words = f"step '{second}' would quantize what '{first}' has rounded; keep one of them"
    assert str(caught.value) == f"recipe:7: {words}"


@pytest.mark.parametrize(
    ("steps", "line", "words"),
    [
        (["lkd: {}"], 5, "step 'lkd' learns from what a step that quantizes left; put rtn or gptq before it"),
        (["awq: {}", "lkd: {}", "rtn: {}"], 6, "step 'lkd' learns from what"),
        (["rotate: {}"], 5, "no step quantizes; add one, such as - rtn: {}"),
        (["awq: {}", "proxy: {}"], 6, "step 'proxy' chooses columns of float weights; put it before 'awq'"),
        (["proxy: {}", "awq: {}"], 6, "no step quantizes"),
        (["rtn: {}", "proxy: {}"], 6, "put it before 'rtn'"),
        (["lorc: {}"], 5, "step 'lorc' corrects what the steps before it left"),
    ],
)
def test_what_makes_none(steps: list[str], line: int, words: str) -> None:
    with pytest.raises(ZqError) as caught:
        resolve_all(recipe(*steps))
    assert str(caught.value).startswith(f"recipe:{line}: ")
    assert words in str(caught.value)


@pytest.mark.parametrize(("samples", "generated", "enough"), [(4, 0, False), (4, 1, True), (5, 0, True)])
def test_held_out_windows_are_counted_by_the_plan(
    samples: int, generated: int, enough: bool, tiny: Callable[..., Path]
) -> None:
    text = str(recipe("gptq: {}", "lkd: {batch: 4}", samples=samples))
    wanted = Recipe.parse(text.replace("generated: 0", f"generated: {generated}"), "my.yaml")
    if enough:
        assert make_plan(tiny("llama"), wanted).samples == 5
        return
    with pytest.raises(
        ZqError, match=r"^my\.yaml:\d+: step 'lkd' needs at least 5 calibration windows, .*has 4;"
    ):
        make_plan(tiny("llama"), wanted)


def test_encoders_go_without_the_windows_that_presets_let_models_write(tiny: Callable[..., Path]) -> None:
    rule = "rules: [{match: '*', weights: 'int4:g32'}]\npreset: quick\n"
    asked = Recipe.parse(rule + "calibration: {source: random, length: 16}")
    decoder, encoder = make_plan(tiny("llama"), asked), make_plan(tiny("bert-model"), asked)
    assert (decoder.samples, encoder.samples) == (64, 32)
    assert encoder.recipe.calibration.generated == 0
    note = "an encoder writes no text: calibration goes without the 32 windows of 'generated'"
    assert note in encoder.notes
    assert note not in decoder.notes
