"""What an evaluation says: frozen dataclasses of plain numbers, ready for JSON, and their statistics.

Tokens inside one window depend on each other, windows (nearly) do not. Every standard error is
therefore taken over the means of the W windows, which are all of the same size:

    se = sqrt( sum_w (m_w - m)^2 / (W - 1) / W )          None for W = 1, where it is unknown

(a cluster-robust standard error, https://en.wikipedia.org/wiki/Clustered_standard_errors).
Percentiles interpolate linearly between the two nearest values, as numpy's default does.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Report:
    """Base: every report is a flat record of numbers and strings (nested for perplexities)."""

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, floats, ints, strings and None: `json.dumps` takes it."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Perplexity(Report):
    """`nll`: mean negative log-likelihood, nats per token; `ppl` = exp(nll); `tokens`: predicted
    tokens, windows * (length - 1); `nll_standard_error`: over windows."""

    nll: float
    nll_standard_error: float | None
    ppl: float
    tokens: int
    windows: int
    length: int
    conventions: str


@dataclass(frozen=True, kw_only=True)
class Divergence(Report):
    """KL(P_reference || P_candidate) in nats per token, and what else one pass over both tells.

    `kl_p50`, `kl_p99`, `kl_p999`, `kl_max`: over tokens; `top1_agreement`: share of tokens for which
    both rank the same token first (0..1); `nll_increase`: candidate minus reference on the same
    tokens, whose paired standard error is far smaller than that of either perplexity.
    """

    kl: float
    kl_standard_error: float | None
    kl_p50: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1_agreement: float
    top1_agreement_standard_error: float | None
    nll_increase: float
    nll_increase_standard_error: float | None
    reference: Perplexity
    candidate: Perplexity
    conventions: str


@dataclass(frozen=True, kw_only=True)
class EncoderAgreement(Report):
    """Cosine between the last hidden states of two encoders: `token_*` over all tokens that the
    mask keeps, `sentence_*` over mean-pooled sequences. 1 means the same direction."""

    token_mean: float
    token_standard_error: float | None
    token_p50: float
    token_p1: float
    token_p01: float
    token_min: float
    sentence_mean: float
    sentence_min: float
    tokens: int
    sequences: int
    conventions: str


def standard_error(cluster_means: Tensor) -> float | None:
    """Standard error of the mean of `cluster_means` [W]; None for W = 1."""
    count = cluster_means.numel()
    if count < 2:
        return None
    return (cluster_means.double().std(unbiased=True) / math.sqrt(count)).item()


def percentile(values: Tensor, *shares: float) -> list[float]:
    """The values below which `shares` (0..1) of `values` (any shape) lie, one per share.

    torch.quantile refuses more than 2^24 elements; a long evaluation has more.
    """
    ordered = values.double().flatten().sort().values
    result = []
    for share in shares:
        place = share * (ordered.numel() - 1)
        low = math.floor(place)
        below, above = ordered[low].item(), ordered[math.ceil(place)].item()
        # Equal neighbours first: infinity minus infinity would be NaN.
        result.append(below if below == above else below + (place - low) * (above - below))
    return result
