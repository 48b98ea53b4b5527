"""How far an encoder (BERT, RoBERTa) moved: cosine between its last hidden states and a reference's.

An encoder has no next token, so no perplexity. What its users read is the direction of the hidden
state of each token, or of the mean over a sentence:

    token     cos(h_t, h'_t)                          for every token that the attention mask keeps
    sentence  cos(mean_t h_t, mean_t h'_t)            mean pooling as in https://arxiv.org/abs/1908.10084

The standard error of the token mean is clustered by sequence (each sequence counts by its tokens'
mean), the percentiles are over tokens, from the bad end: 1 % of the tokens lie below `token_p1`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from zq.errors import ZqError
from zq.eval.perplexity import Progress, batches
from zq.eval.report import EncoderAgreement, percentile, standard_error

# (input_ids int64 [B, L], attention_mask int64 [B, L]) -> last hidden state [B, L, H]
States = Callable[[Tensor, Tensor], Tensor]

CONVENTIONS = (
    "cosine of the last hidden state, float32, tokens of the attention mask; "
    "sentences mean-pooled over the mask; standard error over sequences"
)


def encoder_agreement(
    reference: States,
    candidate: States,
    input_ids: Tensor,
    attention_mask: Tensor,
    batch: int = 8,
    progress: Progress | None = None,
) -> EncoderAgreement:
    """Compare two encoders on `input_ids` and `attention_mask` (int64 [N, L]; 1 keeps a token).

    Raises ZqError when shapes disagree, a sequence is fully masked, or a hidden state is not finite.
    """
    if input_ids.shape != attention_mask.shape or input_ids.ndim != 2:
        raise ZqError(
            f"input_ids {list(input_ids.shape)} and attention_mask {list(attention_mask.shape)} "
            "must have the same shape [sequences, tokens]"
        )
    if not bool(attention_mask.any(1).all()):
        raise ZqError("a sequence has no token that its attention mask keeps; drop empty texts")
    tokens, sequence_means, sentences = [], [], []
    for first, ids in batches(input_ids, batch):
        mask = attention_mask[first : first + ids.shape[0]]
        ours = reference(ids, mask).float().cpu()
        theirs = candidate(ids, mask).float().cpu()
        if ours.shape != theirs.shape:
            raise ZqError(
                f"the reference gives hidden states {list(ours.shape)}, the candidate "
                f"{list(theirs.shape)}: they are not the same architecture; check --against"
            )
        keep = mask.bool()
        cosine = cosine_similarity(ours, theirs, dim=-1)
        if not bool(cosine[keep].isfinite().all()):
            raise ZqError("a hidden state is not finite: one of the models is broken; run its audit")
        tokens.append(cosine[keep])
        sequence_means += [row[kept].mean() for row, kept in zip(cosine, keep, strict=True)]
        sentences.append(sentence_cosine(ours, theirs, mask))
        if progress:
            progress(first + ids.shape[0], input_ids.shape[0])
    return _report(torch.cat(tokens), torch.stack(sequence_means), torch.cat(sentences))


def mean_pool(hidden: Tensor, mask: Tensor) -> Tensor:
    """Mean over the kept tokens: hidden [B, L, H], mask [B, L] (0/1) -> [B, H] in hidden's dtype."""
    weights = mask.to(hidden)[..., None]
    # where, not a product: a masked position may hold NaN, and 0 * NaN is NaN.
    return torch.where(weights > 0, hidden, 0.0).sum(1) / weights.sum(1)


def sentence_cosine(reference: Tensor, candidate: Tensor, mask: Tensor) -> Tensor:
    """Cosine of the mean-pooled states: [B, L, H] twice, mask [B, L] -> [B] in -1..1."""
    return cosine_similarity(mean_pool(reference, mask), mean_pool(candidate, mask), dim=-1)


def _report(tokens: Tensor, sequence_means: Tensor, sentences: Tensor) -> EncoderAgreement:
    p50, p1, p01 = percentile(tokens, 0.5, 0.01, 0.001)
    return EncoderAgreement(
        token_mean=tokens.double().mean().item(),
        token_standard_error=standard_error(sequence_means),
        token_p50=p50,
        token_p1=p1,
        token_p01=p01,
        token_min=tokens.min().item(),
        sentence_mean=sentences.double().mean().item(),
        sentence_min=sentences.min().item(),
        tokens=tokens.numel(),
        sequences=sequence_means.numel(),
        conventions=CONVENTIONS,
    )
