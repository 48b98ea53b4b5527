"""L1 norms: the constant, what they leave alone, and which modules they replace."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny, token_ids
from zq.distill.norms import L1Norm, l1_norms


@pytest.mark.parametrize("centered", [True, False])
def test_on_normal_values_it_is_the_usual_norm(centered: bool) -> None:
    x = torch.randn(50, 20000, generator=torch.Generator().manual_seed(0))
    usual = nn.LayerNorm(20000) if centered else nn.RMSNorm(20000)
    assert float((L1Norm(None, centered=centered)(x) - usual(x)).abs().max()) < 0.1


def test_weights_biases_and_dtypes() -> None:
    norm = L1Norm(torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 0.0, 0.0]))
    x = torch.tensor([[1.0, 2.0, 3.0]])
    expected = torch.tensor([-1.0, 0.0, 1.0]) / (2 / 3) / (torch.pi / 2) ** 0.5
    assert torch.allclose(norm(x)[0], expected * norm.weight + norm.bias, atol=1e-4)
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert bool(norm(torch.zeros(1, 3, dtype=torch.bfloat16)).isfinite().all())


@pytest.mark.parametrize(("family", "count", "centered"), [("llama", 5, False), ("gpt2", 5, True)])
def test_norms_of_a_model_are_replaced(family: str, count: int, centered: bool, tmp_path) -> None:
    save_tiny(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    before = model(token_ids()).logits
    names = l1_norms(model)
    assert len(names) == count
    assert all(model.get_submodule(name).centered == centered for name in names)
    after = model(token_ids()).logits
    assert 0 < float((after - before).norm() / before.norm()) < 1
    assert l1_norms(model) == []
