"""How far a candidate's next-token distribution is from its reference's, token by token.

    KL(P || Q) = sum_v P(v) (log P(v) - log Q(v))      in nats, P: reference, Q: candidate, >= 0

Perplexity can stay the same while every answer changes, and it needs many tokens to settle; KL
compares the whole distribution at each position and settles with few
(https://arxiv.org/abs/2407.09141). It is taken at the positions that predict a token of the window,
the same ones that count for the perplexities, which come out of the same pass.

Memory: the logits of one batch of both models in their own dtype, plus float32 rows below
CHUNK_BYTES each; what is kept is one number per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.eval.perplexity import (
    CONVENTIONS,
    Logits,
    Progress,
    batches,
    check_finite,
    check_logits,
    check_windows,
    chunks,
    pick,
    summarize,
)
from zq.eval.report import Divergence, percentile, standard_error

KL_CONVENTIONS = "KL(P_reference || P_candidate) in nats per token, full vocabulary; "


@dataclass(frozen=True)
class TokenValues:
    """One number per predicted token, each float32 [W, L-1] on the CPU: KL and both negative log-likelihoods
    in nats, and 1 where both models rank the same token first, else 0."""

    kl: Tensor
    same: Tensor
    reference: Tensor
    candidate: Tensor

    def report(self) -> Divergence:
        """The statistics of these values; standard errors over windows."""
        return _report(self.kl, self.same, self.reference, self.candidate)


def divergence(
    reference: Logits,
    candidate: Logits,
    windows: Tensor,
    batch: int = 1,
    progress: Progress | None = None,
) -> Divergence:
    """The report on `token_values`, which takes the same arguments."""
    return token_values(reference, candidate, windows, batch, progress).report()


def token_values(
    reference: Logits,
    candidate: Logits,
    windows: Tensor,
    batch: int = 1,
    progress: Progress | None = None,
) -> TokenValues:
    """Compare two models on `windows` (int64 [W, L], L >= 2), `batch` windows per call.

    The models may sit on different devices; sums run on the reference's. Raises ZqError when the
    vocabularies differ in size, when logits are NaN, or when windows have fewer than two tokens.
    """
    check_windows(windows)
    count, predicted = windows.shape[0], windows.shape[1] - 1
    kl = torch.empty(count, predicted)
    same = torch.empty(count, predicted)
    reference_loss, candidate_loss = torch.empty_like(kl), torch.empty_like(kl)
    for first, ids in batches(windows, batch):
        ours, theirs = reference(ids), candidate(ids)
        check_logits(ours, ids, "the reference")
        check_logits(theirs, ids, "the candidate")
        if ours.shape != theirs.shape:
            raise ZqError(
                f"the reference has {ours.shape[-1]} logits, the candidate {theirs.shape[-1]}: "
                "only models with the same vocabulary can be compared; check --against"
            )
        for row in range(ids.shape[0]):
            at = first + row
            for part in chunks(ours.shape[-1], predicted):
                log_p = ours[row, part].float().log_softmax(-1)
                log_q = theirs[row, part].to(log_p.device).float().log_softmax(-1)
                targets = ids[row, 1:][part]
                kl[at, part] = kl_rows(log_p, log_q).cpu()
                same[at, part] = (log_p.argmax(-1) == log_q.argmax(-1)).float().cpu()
                reference_loss[at, part] = pick(log_p, targets)
                candidate_loss[at, part] = pick(log_q, targets)
        done = slice(first, first + ids.shape[0])
        check_finite(reference_loss[done], first, "the reference")
        check_finite(candidate_loss[done], first, "the candidate")
        if progress:
            progress(done.stop, count)
    return TokenValues(kl, same, reference_loss, candidate_loss)


def kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) of each row: log-probabilities float32 [T, V] -> float32 [T], nats.

    A token that P rules out (log P = -inf, as masked vocabulary padding has) adds nothing; one that
    only Q rules out makes the row infinite.
    """
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def _report(kl: Tensor, same: Tensor, reference: Tensor, candidate: Tensor) -> Divergence:
    """Statistics of per-token values, each float32 [W, L-1]."""
    kl_windows = kl.double().mean(1)
    same_windows = same.double().mean(1)
    increase = (candidate.double() - reference.double()).mean(1)
    p50, p99, p999 = percentile(kl, 0.5, 0.99, 0.999)
    return Divergence(
        kl=kl_windows.mean().item(),
        kl_standard_error=standard_error(kl_windows),
        kl_p50=p50,
        kl_p99=p99,
        kl_p999=p999,
        kl_max=kl.max().item(),
        top1_agreement=same_windows.mean().item(),
        top1_agreement_standard_error=standard_error(same_windows),
        nll_increase=increase.mean().item(),
        nll_increase_standard_error=standard_error(increase),
        reference=summarize(reference),
        candidate=summarize(candidate),
        conventions=KL_CONVENTIONS + CONVENTIONS.format(length=kl.shape[1] + 1),
    )
