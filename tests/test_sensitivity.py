"""The predicted loss of one quantized site against the loss of a whole model with that site quantized."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.simulate import outputs, simulated
from tests.tiny import save_tiny
from zq.autobits import _sites
from zq.plan import make_plan
from zq.recipe import Bits, Recipe
from zq.sensitivity import measure

RECIPE = """
rules: [{match: '*', weights: 'int4:g32', activations: 'int8:token'}]
calibration: {source: random, samples: 40, length: 32}
"""


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "bloom", "qwen2", "bert", "opt-post"])
def test_it_predicts_the_divergence_of_the_whole_model(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    asked = Bits(mean=5.0, widths=(4, 6))
    plan = make_plan(tmp_path, replace(Recipe.parse(RECIPE), bits=asked))
    sites = _sites(plan, asked)
    found = measure(plan, sites, lambda event: None)
    assert plan.windows is not None
    reference = outputs(simulated(tmp_path, lambda name: None), plan.windows).log_softmax(-1)
    ratios = []
    for site, errors in zip(sites, found, strict=True):
        for width in (4, 6):
            schemes = dict(zip((x.name for x in site.layers), site.schemes[width], strict=True))
            model = simulated(tmp_path, lambda name, s=schemes: str(s[name]) if name in s else None)
            candidate = outputs(model, plan.windows).log_softmax(-1)
            divergence = (reference.exp() * (reference - candidate)).sum(-1).mean()
            ratios.append(math.log(errors[width] / float(divergence)))
    logs = torch.tensor(ratios)
    assert abs(logs.mean()) < math.log(1.25), logs.exp()
    assert logs.abs().max() < math.log(2.0), logs.exp()


@pytest.mark.parametrize("family", ["bert-model", "bert-nopooler"])
def test_without_a_head_it_predicts_the_error_of_the_last_hidden_states(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path)
    asked = Bits(mean=5.0, widths=(4,))
    plan = make_plan(tmp_path, replace(Recipe.parse(RECIPE), bits=asked))
    sites = _sites(plan, asked)
    found = measure(plan, sites, lambda event: None)
    assert plan.windows is not None
    reference = outputs(simulated(tmp_path, lambda name: None), plan.windows)
    for site, errors in zip(sites, found, strict=True):
        names = {layer.name for layer in site.layers}
        model = simulated(tmp_path, lambda name, n=names: "int4:g32 @ int8:token" if name in n else None)
        error = (outputs(model, plan.windows) - reference).square().sum() / reference.square().sum()
        assert errors[4] == pytest.approx(float(error), rel=0.5)


def test_the_depth_does_not_run_out_of_range(tmp_path: Path) -> None:
    """float16 gradients would be lost below 6e-8 without their exponents."""
    found = []
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        save_tiny("llama", folder, dtype)
        asked = Bits(mean=5.0, widths=(4,))
        plan = make_plan(folder, replace(Recipe.parse(RECIPE), bits=asked))
        found.append([e[4] for e in measure(plan, _sites(plan, asked), lambda event: None)])
    assert torch.tensor(found[1]) == pytest.approx(torch.tensor(found[0]), rel=0.25)
