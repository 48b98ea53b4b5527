"""Models out of a config alone."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import TINY
from zq.bench.shapes import SHAPES, shape_config
from zq.bench.synthetic import empty, random_model, schemes
from zq.errors import ZqError
from zq.models.families import FAMILIES
from zq.runtime.serving import ServedLinear

BF16 = torch.bfloat16


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_a_model_that_zq_knows(name: str):
    config = shape_config(name, layers=2)
    model = empty(config, BF16, "cpu")
    assert config.num_hidden_layers == 2
    assert config.model_type in FAMILIES
    assert len(schemes(model, "w8a8")) % 2 == 0
    assert shape_config(name).num_hidden_layers > 2


def test_sizes_are_those_that_the_names_promise():
    def parameters(name: str) -> float:
        model = empty(shape_config(name), BF16, "cpu")
        tied = model.all_tied_weights_keys
        return sum(p.numel() for n, p in model.named_parameters() if n not in tied) / 1e9

    assert parameters("llama-3-8b") == pytest.approx(8.03, abs=0.01)
    assert parameters("gpt2-xl") == pytest.approx(1.56, abs=0.01)
    assert parameters("smollm2-135m") == pytest.approx(0.1345, abs=0.0005)
    assert parameters("bert-base") == pytest.approx(0.1095, abs=0.0005)


@pytest.mark.parametrize(
    "name", ["llama", "llama-tied", "gpt2", "gpt_neox", "bloom", "opt", "gptj", "qwen3", "bert"]
)
@pytest.mark.parametrize("text", [None, "w8a8", "int4:g32 @ int8:token"])
def test_a_random_model_runs_and_nothing_of_it_is_missing(name: str, text: str | None):
    config = TINY[name]()
    assigned = schemes(empty(config, BF16, "cpu"), text) if text else None
    model = random_model(config, BF16, "cpu", assigned)
    served = [n for n, m in model.named_modules() if isinstance(m, ServedLinear)]
    assert set(served) == set(assigned or {})
    assert not any(value.is_meta for value in [*model.parameters(), *model.buffers()])
    for target, source in model.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)
    ids = torch.arange(4, 20).view(2, 8)
    with torch.no_grad():
        out = model(input_ids=ids)[0]
    assert out.dtype == BF16
    assert bool(out.isfinite().all())
    assert float(out.float().std()) > 0
    again = random_model(config, BF16, "cpu", assigned)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids)[0], out), "the same weights each time"


def test_rules_choose_layers_and_groups_fit(tmp_path):
    file = tmp_path / "mixed.yaml"
    file.write_text(
        "rules:\n  - {match: '@mlp', weights: 'int4:gauto', activations: 'int8:token'}\n"
        "  - {match: '*', skip: true}\n"
    )
    found = schemes(empty(shape_config("gpt2-xl", 2), BF16, "cpu"), str(file))
    assert {str(scheme) for scheme in found.values()} == {"int4:g64 @ int8:token"}
    assert all(".mlp." in name for name in found)
    assert len(found) == 4
    file.write_text("rules:\n  - {match: '*', skip: true}\n")
    with pytest.raises(ZqError, match="quantizes no layer"):
        schemes(empty(shape_config("gpt2", 1), BF16, "cpu"), str(file))
