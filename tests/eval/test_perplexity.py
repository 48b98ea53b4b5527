"""zq.eval.perplexity against transformers' own loss and torch's cross entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel

from zq.errors import ZqError
from zq.eval.adapt import decoder_logits
from zq.eval.perplexity import CHUNK_BYTES, chunks, perplexity

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    return GPT2LMHeadModel(config)  # in training mode, with dropout: decoder_logits must end that


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(VOCAB, (5, 24), generator=torch.Generator().manual_seed(1))


def test_it_is_transformers_own_loss(model, windows):
    logits = decoder_logits(model)
    report = perplexity(logits, windows, batch=2)
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    expected = torch.stack(losses)
    assert report.nll == pytest.approx(expected.mean().item(), rel=1e-6)
    assert report.ppl == pytest.approx(math.exp(report.nll), rel=1e-12)
    assert report.nll_standard_error == pytest.approx((expected.std() / math.sqrt(5)).item(), rel=1e-4)
    assert (report.tokens, report.windows, report.length) == (5 * 23, 5, 24)


@pytest.mark.parametrize("batch", [1, 3, 5, 8])
def test_batches_and_chunks_change_nothing(model, windows, batch, monkeypatch):
    whole = perplexity(decoder_logits(model), windows, batch=5)
    monkeypatch.setattr("zq.eval.perplexity.CHUNK_BYTES", 7 * 4 * VOCAB)  # 7 rows at a time
    seen = []
    parts = perplexity(decoder_logits(model), windows, batch, lambda done, total: seen.append((done, total)))
    assert parts.nll == pytest.approx(whole.nll, rel=1e-6)
    assert seen == [(min(done, 5), 5) for done in range(batch, 5 + batch, batch)]


def test_bfloat16_logits_are_summed_in_float32():
    """4096 equally likely tokens: bfloat16 arithmetic would not give log 4096 to six digits."""
    windows = torch.zeros(2, 8, dtype=torch.int64)
    report = perplexity(lambda ids: torch.full((*ids.shape, 4096), 3.1415, dtype=torch.bfloat16), windows)
    assert report.nll == pytest.approx(math.log(4096), rel=1e-6)
    logits = (torch.randn(2, 8, 500) * 5).bfloat16()
    report = perplexity(lambda ids: logits, windows + 3, batch=2)
    expected = cross_entropy(logits[:, :-1].float().flatten(0, 1), (windows + 3)[:, 1:].flatten())
    assert report.nll == pytest.approx(expected.item(), rel=1e-6)


def test_chunks_cover_all_rows_within_the_bound():
    for vocabulary, rows in [(49152, 1023), (256000, 2047), (10**8, 3), (97, 24), (5, 0)]:
        parts = list(chunks(vocabulary, rows))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
        assert all((p.stop - p.start) * vocabulary * 4 <= max(CHUNK_BYTES, 4 * vocabulary) for p in parts)


def test_bad_input(model, windows):
    logits = decoder_logits(model)
    for shape in ([3, 1], [0, 8], [8]):
        with pytest.raises(ZqError, match="cannot be evaluated; allowed is"):
            perplexity(logits, torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ZqError, match="batch = 0 is not allowed"):
        perplexity(logits, windows, batch=0)
    with pytest.raises(ZqError, match="token id 97 is outside of the 97 logits"):
        perplexity(lambda ids: torch.zeros(*ids.shape, VOCAB), torch.full((1, 4), VOCAB))
    with pytest.raises(ZqError, match="perplexity needs a decoder"):
        perplexity(lambda ids: torch.zeros(ids.shape[0], 2), windows)


def test_nan_is_named_by_window(windows):
    def broken(ids: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*ids.shape, VOCAB)
        out[(ids == windows[3]).all(1)] = math.nan
        return out

    for batch in (1, 2, 5):
        with pytest.raises(ZqError, match="the model gave logits that are NaN in window 3"):
            perplexity(broken, windows, batch=batch)


@pytest.mark.demo
def test_demo_perplexity_of_the_bundled_text(demo_model):
    """Measured once with transformers' own loss; a wrong tokenizer or conversion shows here."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from zq.data import evaluation_windows, load_text

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16)
    windows = evaluation_windows(load_text("bundled-eval"), tokenizer, 2, 512)
    report = perplexity(decoder_logits(model), windows)
    with torch.inference_mode():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in windows]
    assert report.nll == pytest.approx(sum(losses) / 2, abs=2e-3)
    assert 5 < report.ppl < 25
