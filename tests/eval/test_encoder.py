"""zq.eval.encoder and adapt against cosines written out in numpy, and on a real encoder."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from zq.errors import ZqError
from zq.eval.adapt import encode_sentences, encoder_states, split_sentences
from zq.eval.encoder import encoder_agreement, mean_pool, sentence_cosine

N, L, H = 7, 10, 16


def states(seed: int) -> torch.Tensor:
    return torch.randn(N, L, H, generator=torch.Generator().manual_seed(seed))


def lookup(hidden: torch.Tensor):
    """An encoder that knows its sequences by their first token, the sequence's number."""
    return lambda ids, mask: hidden[ids[:, 0]]


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.arange(N)[:, None].expand(N, L).contiguous()
    lengths = torch.tensor([10, 3, 1, 7, 10, 5, 2])
    return ids, (torch.arange(L) < lengths[:, None]).long()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@pytest.mark.parametrize("size", [1, 3, 16])
def test_against_numpy(batch, size):
    ids, mask = batch
    a, b = states(1), states(1) + 0.4 * states(2)
    # Whatever stands at masked positions must not matter.
    b[mask == 0] = math.nan
    report = encoder_agreement(lookup(a), lookup(b), ids, mask, size)
    rows = [[cosine(a[i, t].double().numpy(), b[i, t].double().numpy()) for t in range(int(mask[i].sum()))]
            for i in range(N)]  # fmt: skip
    every = np.concatenate(rows)
    assert report.token_mean == pytest.approx(every.mean(), rel=1e-6)
    assert report.token_min == pytest.approx(every.min(), rel=1e-5)
    found = [report.token_p50, report.token_p1, report.token_p01]
    np.testing.assert_allclose(found, np.percentile(every, [50, 1, 0.1]), rtol=1e-5)
    means = np.array([np.mean(row) for row in rows])
    assert report.token_standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(N), rel=1e-4)
    sentences = [
        cosine(
            x[i, : int(mask[i].sum())].double().mean(0).numpy(),
            y[i, : int(mask[i].sum())].double().mean(0).numpy(),
        )
        for i in range(N)
        for x, y in [(a, b)]
    ]
    assert report.sentence_mean == pytest.approx(np.mean(sentences), rel=1e-5)
    assert report.sentence_min == pytest.approx(np.min(sentences), rel=1e-5)
    assert (report.tokens, report.sequences) == (int(mask.sum()), N)


def test_equal_and_opposite(batch):
    ids, mask = batch
    same = encoder_agreement(lookup(states(1)), lookup(states(1) * 3), ids, mask)
    assert same.token_min == pytest.approx(1.0, abs=1e-6)
    assert same.sentence_min == pytest.approx(1.0, abs=1e-6)
    opposite = encoder_agreement(lookup(states(1)), lookup(-states(1)), ids, mask)
    assert opposite.token_mean == pytest.approx(-1.0, abs=1e-6)


def test_mean_pool_and_sentence_cosine():
    hidden = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [math.nan, 9.0]]])
    mask = torch.tensor([[1, 1, 0]])
    assert mean_pool(hidden, mask).tolist() == [[2.0, 1.0]]
    assert sentence_cosine(hidden, hidden * 5, mask).tolist() == pytest.approx([1.0])


def test_errors(batch):
    ids, mask = batch
    model = lookup(states(1))
    with pytest.raises(ZqError, match="must have the same shape"):
        encoder_agreement(model, model, ids, mask[:, 1:])
    with pytest.raises(ZqError, match="no token that its attention mask keeps"):
        encoder_agreement(model, model, ids, mask * (ids != 3))
    with pytest.raises(ZqError, match="not the same architecture"):
        encoder_agreement(model, lookup(states(1)[..., :5]), ids, mask)
    with pytest.raises(ZqError, match="a hidden state is not finite"):
        encoder_agreement(model, lookup(states(1) * math.nan), ids, mask)


def test_states_of_models_with_and_without_a_head():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    headed = BertForMaskedLM(config)
    bare = BertModel(config, add_pooling_layer=False)
    bare.load_state_dict(headed.bert.state_dict())
    ids = torch.randint(50, (3, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
    found = encoder_states(headed)(ids, mask)  # made in training mode: dropout must be off
    assert torch.equal(found, encoder_states(bare)(ids, mask))
    assert torch.equal(found, bare(input_ids=ids, attention_mask=mask).last_hidden_state)
    alone = encoder_states(bare)(ids[1:2, :4], mask[1:2, :4])
    torch.testing.assert_close(found[1, :4], alone[0])  # the mask works


def test_split_sentences():
    paragraph = "First sentence, which is long enough to count. Short. " + "x" * 400 + ". "
    text = "\n\n".join(paragraph + f"Number {i} is the last\none of this long paragraph." for i in range(10))
    found = split_sentences(text, 5)
    assert len(set(found)) == 5 or len(found) == 5
    assert all(40 <= len(s) <= 301 and s.endswith(".") and "\n" not in s for s in found)
    assert split_sentences(text, 20)[1] == "Number 0 is the last one of this long paragraph."
    with pytest.raises(ZqError, match="has 20 sentences of 40 to 300 characters; 21 are needed"):
        split_sentences(text, 21)


@pytest.mark.demo
def test_real_encoder(minilm_model):
    """MiniLM: paraphrases are close, unrelated sentences are not; 8-bit weights hardly move it."""
    from transformers import AutoModel, AutoTokenizer

    from zq.data import load_text

    tokenizer = AutoTokenizer.from_pretrained(minilm_model)
    model, rounded = (AutoModel.from_pretrained(minilm_model) for _ in range(2))
    ids, mask = encode_sentences(
        ["A man is eating food.", "A man is eating a meal.", "The stock market fell sharply today."],
        tokenizer,
    )
    assert ids[0, 0] == tokenizer.cls_token_id
    hidden = encoder_states(model)(ids, mask)
    close = sentence_cosine(hidden[:1], hidden[1:2], torch.ones(1, hidden.shape[1]) * mask[0])
    far = sentence_cosine(hidden[:1, :7], hidden[2:, :7], mask[:1, :7])
    assert close.item() > 0.7
    assert far.item() < 0.3

    with torch.no_grad():
        for linear in [m for m in rounded.encoder.modules() if isinstance(m, torch.nn.Linear)]:
            scale = linear.weight.abs().amax(1, keepdim=True) / 127
            linear.weight.copy_((linear.weight / scale).round() * scale)
    sentences = split_sentences(load_text("bundled-eval"), 32)
    report = encoder_agreement(
        encoder_states(model), encoder_states(rounded), *encode_sentences(sentences, tokenizer)
    )
    assert 0.99 < report.token_mean < 1.0
    assert 0.999 < report.sentence_mean < 1.0
    assert report.token_min <= report.token_p01 <= report.token_p1 <= report.token_p50
    assert report.sequences == 32
