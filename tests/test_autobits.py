"""Automatic bits: the solver against every mix there is, the mix against the budget, and the run against the
same recipe written by hand."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import zq
from tests.simulate import outputs, simulated, stop_after
from tests.tiny import save_tiny, token_ids
from zq import autobits
from zq.autobits import choose, offered, settle
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.recipe import Bits, Recipe

RECIPE = """
rules: [{match: '*', weights: 'int4:g32'}]
bits: {mean: 5.0, widths: [2, 3, 4, 6, 8]}
calibration: {source: random, samples: 8, length: 16}
"""


def _recipe(old: str = "", new: str = "", text: str = RECIPE) -> Recipe:
    assert old in text
    return Recipe.parse(text.replace(old, new) if old else text)


def _widths(plan: Plan) -> dict[str, int]:
    return {layer.name: layer.scheme.weights.bits for layer in plan.layers if layer.scheme}


def _no_measuring(*_: Any) -> None:
    raise AssertionError("measured again")


# --- the solver -------------------------------------------------------------------------------------------

sites = st.lists(
    st.dictionaries(
        st.integers(2, 8), st.tuples(st.integers(1, 60), st.floats(0, 9)), min_size=1, max_size=4
    ),
    min_size=1,
    max_size=5,
)


@given(sites, st.floats(0, 1), st.integers(1, 7))
def test_no_mix_within_the_room_has_a_smaller_error(rows: list, share: float, scale: int) -> None:
    costs = [{width: cost * scale for width, (cost, _) in row.items()} for row in rows]
    errors = [{width: error for width, (_, error) in row.items()} for row in rows]
    least, most = (sum(f(row.values()) for row in costs) for f in (min, max))
    room = least + round(share * (most - least))
    chosen = choose(costs, errors, room)
    assert sum(row[w] for row, w in zip(costs, chosen, strict=True)) <= room
    best = min(
        sum(row[w] for row, w in zip(errors, mix, strict=True))
        for mix in itertools.product(*errors)
        if sum(row[w] for row, w in zip(costs, mix, strict=True)) <= room
    )
    assert sum(row[w] for row, w in zip(errors, chosen, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize(("steps", "tolerance"), [(100_000, 1.005), (10_000, 1.05)])
def test_costs_without_a_common_divisor_lose_little(
    steps: int, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against Lagrange's bound: for every price l >= 0, no mix is below sum min(error + l cost) - l room."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1_000, 100_000, (60,), generator=generator).tolist()
    costs = [{w: n * w + (w == 8) for w in (2, 3, 4, 8)} for n in sizes]
    errors = [{w: n * 4.0**-w * (1 + i % 7) for w in (2, 3, 4, 8)} for i, n in enumerate(sizes)]
    room = sum(row[4] for row in costs)
    monkeypatch.setattr(autobits, "STEPS", steps)
    chosen = choose(costs, errors, room)
    assert sum(row[w] for row, w in zip(costs, chosen, strict=True)) <= room
    both = list(zip(costs, errors, strict=True))
    bound = max(
        sum(min(error[w] + price * cost[w] for w in cost) for cost, error in both) - price * room
        for price in torch.logspace(-5, 1, 300, dtype=torch.float64).tolist()
    )
    assert sum(row[w] for row, w in zip(errors, chosen, strict=True)) <= tolerance * bound


def test_the_cheaper_of_two_equals() -> None:
    assert choose([{4: 10, 8: 20}, {4: 10, 8: 20}], [{4: 0.5, 8: 0.5}, {4: 0.5, 8: 0.1}], 100) == [4, 8]


# --- the mix ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [4.0, 4.5, 5.25, 7.9])
@pytest.mark.parametrize("family", ["llama", "gptj", "gpt2", "bert-model"])
def test_one_width_for_what_engines_fuse_and_never_over_the_budget(
    family: str, mean: float, tmp_path: Path
) -> None:
    save_tiny(family, tmp_path)
    plan = settle(make_plan(tmp_path, replace(_recipe(), bits=Bits(mean=mean, widths=(2, 3, 4, 6, 8)))))
    assert plan.recipe.bits is None
    assert plan.bits_per_weight <= mean
    widths, table = _widths(plan), plan.sensitivity
    assert table is not None
    rows = {row["site"]: row for row in table["sites"]}
    for i in range(plan.skeleton.n_blocks):
        prefix = plan.skeleton.block_prefix(i)
        for site in plan.skeleton.arch.sites:
            found = {widths[f"{prefix}.{path}"] for path in site.linears}
            assert found == {rows[f"{prefix} {site.name}"]["bits"]}
    weights = sum(math.prod(layer.shape) for layer in plan.layers if layer.scheme)
    spent = sum(row["bytes"][str(row["bits"])] for row in rows.values())
    assert 8 * spent / weights == pytest.approx(plan.bits_per_weight)
    left = mean * weights / 8 - spent
    for row in rows.values():  # nothing better would still fit
        now = str(row["bits"])
        for width, nbytes in row["bytes"].items():
            gains = row["error"][width] < row["error"][now]
            assert not (gains and nbytes - row["bytes"][now] <= left), (row, left)


def test_a_site_that_matters_gets_more_bits(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = _widths(settle(make_plan(tmp_path, _recipe())))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.o_proj.weight"][:, ::32] *= 20  # an outlier in every group
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    after, name = _widths(settle(make_plan(tmp_path, _recipe()))), "model.layers.1.self_attn.o_proj"
    assert before[name] < after[name] == max(after.values())


def test_the_same_choice_every_time_and_reasons_that_can_be_read(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, torch.bfloat16)
    events: list[dict] = []
    one = settle(make_plan(tmp_path, _recipe()), progress=events.append)
    two = settle(make_plan(tmp_path, _recipe()))
    assert one.recipe.digest == two.recipe.digest
    assert one.sensitivity == two.sensitivity
    assert [event["measured"] for event in events] == ["model.layers.1", "model.layers.0"]
    assert any(note.startswith("bits 5: sites ") for note in one.notes)
    for row in one.rows():
        chosen = row["becomes"].startswith("int") and not row["becomes"].startswith("int4")
        assert row["why"].startswith("bits 5: error ") == chosen
    assert settle(one) is one
    base = load_file(tmp_path / "model.safetensors")
    again = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(base[name], again[name]) for name in base)


def test_w4a8_takes_a_channel_scale_at_8_bits_and_stays_loadable(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    text = RECIPE.replace("'int4:g32'", "'int4:g32', activations: 'int8:token'").replace(
        "{mean: 5.0, widths: [2, 3, 4, 6, 8]}", "6"
    )
    plan = settle(make_plan(tmp_path, Recipe.parse(text)))
    schemes = {str(layer.scheme) for layer in plan.layers if layer.scheme}
    assert schemes == {"int4:g32 @ int8:token", "int8:channel @ int8:token"}
    assert plan.format == "compressed-tensors"


def test_what_the_rules_skip_stays_and_what_lies_outside_counts(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    rules = "[{match: '*.1.mlp.*', skip: true}, {match: lm_head, weights: 'int8:channel'}, {match: '*', "
    plan = settle(make_plan(tmp_path, _recipe("[{match: '*', ", rules)))
    widths = _widths(plan)
    assert "model.layers.1.mlp.up_proj" not in widths
    assert widths["lm_head"] == 8
    assert plan.bits_per_weight <= 5.0


# --- the run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert", "qwen2"])
def test_it_writes_what_the_same_rules_by_hand_would(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "model")
    recipe = _recipe("5.0", "5.5")
    report = quantize(make_plan(tmp_path / "model", recipe), tmp_path / "out").report
    chosen = {name: layer["scheme"] for name, layer in report["layers"].items()}
    assert len(set(chosen.values())) > 1
    reference = simulated(tmp_path / "model", chosen.get)
    expected = outputs(reference, token_ids())
    assert torch.equal(outputs(zq.load(tmp_path / "out"), token_ids()), expected)
    assert report["audit"]["passed"] is True
    by_hand = Recipe.parse(report["recipe"])
    assert by_hand.bits is None
    quantize(make_plan(tmp_path / "model", by_hand), tmp_path / "again")
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("out", "again"))
    assert a == b
    assert {row["bits"] for row in report["sensitivity"]["sites"]} == {
        int(scheme[3]) for scheme in chosen.values()
    }


def test_a_resumed_run_keeps_the_choice_and_does_not_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path / "model", torch.bfloat16)

    def plan(old: str = "", new: str = "") -> Plan:
        return make_plan(tmp_path / "model", _recipe(old, new))

    quantize(plan(), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        quantize(plan(), tmp_path / "out", progress=stop_after(2))
    monkeypatch.setattr(autobits, "measure", _no_measuring)
    with pytest.raises(ZqError, match="was begun with another recipe before automatic bits"):
        quantize(plan("5.0", "4.0"), tmp_path / "out", resume=True)
    with pytest.raises(ZqError, match="was begun with another recipe"):
        quantize(plan("bits: {mean: 5.0, widths: [2, 3, 4, 6, 8]}", ""), tmp_path / "out", resume=True)
    with pytest.raises(ZqError, match="holds no interrupted job to resume"):
        quantize(plan(), tmp_path / "nothing", resume=True)
    with pytest.raises(ZqError, match="exists and is not empty"):
        quantize(plan(), tmp_path / "whole")
    quantize(plan(), tmp_path / "out", resume=True)
    files = [
        {p.name: p.read_bytes() for p in (tmp_path / x).iterdir() if p.name != "zq_report.json"}
        for x in ("whole", "out")
    ]
    assert files[0] == files[1]
    reports = [json.loads((tmp_path / x / "zq_report.json").read_text()) for x in ("whole", "out")]
    assert reports[0]["sensitivity"] == reports[1]["sensitivity"]


def test_with_gptq_and_a_correction_the_bytes_of_both_count(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    recipe = Recipe.parse(RECIPE.replace("5.0", "7.0") + "steps: [{gptq: {}}, {lorc: {rank: 1}}]\n")
    report = quantize(make_plan(tmp_path / "model", recipe), tmp_path / "out").report
    assert 6.5 < report["bits_per_weight"] <= 7.0
    assert all(":lorc=1" in layer["scheme"] for layer in report["layers"].values())
    assert torch.isfinite(outputs(zq.load(tmp_path / "out"), token_ids())).all()


# --- what is refused --------------------------------------------------------------------------------------

Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "5.0",
            "2.0",
            r"recipe:3: 2 bits per weight are out of reach; the widths 2, 3, 4, 6, 8 give from",
        ),
        ("5.0", "9.5", r"out of reach; .* to 9\.\d+, scales included; give a number in between"),
        ("int4:g32", "e4m3fn:channel", "becomes e4m3fn:channel, and bits are chosen among integers"),
        ("source: random", "source: none", "bits are chosen by calibration tokens; drop --calib none"),
    ],
)
def test_refused_before_any_work(old: str, new: str, message: str, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    with pytest.raises(ZqError, match=message):
        settle(make_plan(tmp_path, _recipe(old, new)))


def test_a_width_that_the_format_cannot_hold_is_no_choice(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    text = RECIPE.replace("'int4:g32'", "'int4:g32', activations: 'e4m3fn:token'")
    plan = settle(make_plan(tmp_path, Recipe.parse(text)))
    assert plan.sensitivity is not None
    assert {tuple(row["error"]) for row in plan.sensitivity["sites"]} == {("2", "3", "4", "6")}
    with pytest.raises(ZqError, match=r"holds none of the widths \[8\] of 'model.layers.0 qkv'"):
        settle(make_plan(tmp_path, Recipe.parse(text.replace("[2, 3, 4, 6, 8]", "[8]"))))


@pytest.mark.parametrize(
    ("format", "weights", "words"),
    [
        ("gptq", "int4:g32", "recipe:3: GPTQ has one scheme for all layers, not int4:g32:s=half and int8:"),
        (
            "awq",
            "int4:g32:asym",
            "recipe:3: awq has int4 weights only, so there are no widths to choose;",
        ),
    ],
)
def test_formats_of_one_width_are_refused_before_measuring(
    format: str, weights: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama", tmp_path)
    text = RECIPE.replace("int4:g32", weights).replace("[2, 3, 4, 6, 8]", "[4, 8]") + f"format: {format}\n"
    monkeypatch.setattr(autobits, "measure", _no_measuring)
    with pytest.raises(ZqError) as caught:
        settle(make_plan(tmp_path, Recipe.parse(text)))
    assert str(caught.value).startswith(words)
    assert str(caught.value).endswith(
        "or use --to compressed-tensors (in a recipe, format: compressed-tensors)"
    )


def test_what_may_be_chosen_is_offered(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plan = make_plan(tmp_path, _recipe())
    found = offered(plan)
    assert [{scheme.weights.bits for scheme in at.values()} for at in found] == [
        {2}, {3}, {4}, set(), {6}, set(), {8}
    ]  # fmt: skip
    assert set(found[0]) == set(plan.assigned)


def test_activations_that_overflow_are_said(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path, torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 60000
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError, match="are NaN or Inf at the last block, so no bits can be chosen"):
        settle(make_plan(tmp_path, _recipe()))
