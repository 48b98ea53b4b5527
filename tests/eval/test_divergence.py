"""zq.eval.divergence against torch.nn.functional.kl_div in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from zq.errors import ZqError
from zq.eval.divergence import divergence, kl_rows
from zq.eval.perplexity import perplexity

W, L, V = 6, 33, 211


def table(seed: int, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(W, L, V, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


def lookup(logits: torch.Tensor):
    """A model that knows its windows by their first token, the window's number."""
    return lambda ids: logits[ids[:, 0]]


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    ids = torch.randint(V, (W, L), generator=torch.Generator().manual_seed(9))
    ids[:, 0] = torch.arange(W)
    return ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_against_float64(windows, dtype, batch, monkeypatch):
    monkeypatch.setattr("zq.eval.perplexity.CHUNK_BYTES", 10 * 4 * V)
    p = table(1, dtype)
    q = (p.float() + 0.3 * table(2)).to(dtype)
    report = divergence(lookup(p), lookup(q), windows, batch)

    p64, q64 = p[:, :-1].double(), q[:, :-1].double()
    kl = kl_div(q64.log_softmax(-1), p64.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    assert report.kl == pytest.approx(kl.mean().item(), rel=1e-5)
    means = kl.mean(1)
    assert report.kl_standard_error == pytest.approx((means.std() / math.sqrt(W)).item(), rel=1e-4)
    expected = np.percentile(kl.numpy(), [50, 99, 99.9, 100])
    found = [report.kl_p50, report.kl_p99, report.kl_p999, report.kl_max]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    same = (p64.argmax(-1) == q64.argmax(-1)).double()
    assert report.top1_agreement == pytest.approx(same.mean().item())
    assert 0.3 < report.top1_agreement < 0.98

    losses = [
        cross_entropy(x.flatten(0, 1), windows[:, 1:].flatten(), reduction="none").view(W, L - 1)
        for x in (p64, q64)
    ]
    assert report.reference.nll == pytest.approx(losses[0].mean().item(), rel=1e-6)
    assert report.candidate.nll == pytest.approx(losses[1].mean().item(), rel=1e-6)
    increase = (losses[1] - losses[0]).mean(1)
    assert report.nll_increase == pytest.approx(increase.mean().item(), abs=1e-5)
    paired = (increase.std() / math.sqrt(W)).item()
    assert report.nll_increase_standard_error == pytest.approx(paired, rel=1e-3)


def test_perplexities_are_those_of_perplexity(windows):
    p, q = table(1), table(2)
    report = divergence(lookup(p), lookup(q), windows, batch=2)
    assert report.reference == perplexity(lookup(p), windows)
    assert report.candidate == perplexity(lookup(q), windows)


def test_direction():
    """KL(P || Q) of two known distributions, both ways: 0.5 log(0.5/0.9) + 0.5 log(0.5/0.1), ..."""
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    windows = torch.zeros(1, 2, dtype=torch.int64)
    forward = divergence(lambda ids: p.expand(1, 2, 2), lambda ids: q.expand(1, 2, 2), windows)
    backward = divergence(lambda ids: q.expand(1, 2, 2), lambda ids: p.expand(1, 2, 2), windows)
    assert forward.kl == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)
    assert backward.kl == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5), rel=1e-6)
    assert forward.kl_standard_error is None


def test_the_same_model_diverges_by_nothing(windows):
    report = divergence(lookup(table(3)), lookup(table(3)), windows)
    assert (report.kl, report.kl_max, report.top1_agreement) == (0.0, 0.0, 1.0)
    assert (report.nll_increase, report.nll_increase_standard_error) == (0.0, 0.0)
    assert report.reference == report.candidate


def test_a_shift_of_all_logits_changes_nothing(windows):
    """softmax(x + c) = softmax(x)."""
    report = divergence(lookup(table(3)), lookup(table(3) + 7.0), windows)
    assert report.kl == pytest.approx(0.0, abs=1e-6)


def test_ruled_out_tokens():
    """-inf in both (padded vocabulary) adds nothing; -inf only in the candidate is infinite."""
    p = torch.tensor([[0.0, 1.0, -math.inf], [0.0, 1.0, 2.0]]).log_softmax(-1)
    q = torch.tensor([[1.0, 0.0, -math.inf], [0.0, 1.0, -math.inf]]).log_softmax(-1)
    found = kl_rows(p, q)
    assert found[0].item() == pytest.approx(
        kl_div(q[0, :2], p[0, :2], log_target=True, reduction="sum").item(), rel=1e-6
    )
    assert found[1].item() == math.inf


def test_progress_and_errors(windows):
    seen = []
    divergence(lookup(table(1)), lookup(table(2)), windows, 4, lambda *done: seen.append(done))
    assert seen == [(4, W), (W, W)]
    with pytest.raises(ZqError, match=f"the reference has {V} logits, the candidate {V + 5}"):
        divergence(lookup(table(1)), lambda ids: torch.zeros(*ids.shape, V + 5), windows)
    with pytest.raises(ZqError, match="the candidate gave logits that are NaN in window 0"):
        divergence(lookup(table(1)), lambda ids: torch.full((*ids.shape, V), math.nan), windows)
    with pytest.raises(ZqError, match="cannot be evaluated"):
        divergence(lookup(table(1)), lookup(table(1)), windows[:, :1])


@pytest.mark.demo
def test_demo_model_rounded_to_8_bits(demo_model):
    """Rounding every weight to 8 bits per row moves the model a little: a small, positive KL."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zq.data import evaluation_windows, load_text
    from zq.eval.adapt import decoder_logits

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    load = AutoModelForCausalLM.from_pretrained
    models = [load(demo_model, dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        for layer in models[1].model.layers:
            for linear in [m for m in layer.modules() if isinstance(m, torch.nn.Linear)]:
                weight = linear.weight.float()
                scale = weight.abs().amax(1, keepdim=True) / 127
                linear.weight.copy_((weight / scale).round() * scale)
    windows = evaluation_windows(load_text("bundled-eval"), tokenizer, 2, 256)
    report = divergence(decoder_logits(models[0]), decoder_logits(models[1]), windows, batch=2)
    assert 1e-4 < report.kl < 0.03
    assert report.kl_p50 < report.kl_p99 <= report.kl_p999 <= report.kl_max
    assert 0.9 < report.top1_agreement < 1.0
