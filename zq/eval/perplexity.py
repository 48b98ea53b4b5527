"""Perplexity of a decoder over independent token windows.

    nll = mean over windows and t = 2..L of  -log softmax(logits(x_1 .. x_{t-1}))[x_t],    ppl = exp(nll)

Windows do not see each other, nothing is put in front of them (no BOS), the first token of each is
given, not predicted. The logits come in the model's own dtype; the log-softmax is float32 and runs
over a few rows at a time, so the float32 copy of the logits stays below CHUNK_BYTES.

Other conventions (a sliding window, a BOS, a text joined differently) give other numbers: figures are
comparable only where `conventions` reads the same.
See https://huggingface.co/docs/transformers/perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.eval.report import Perplexity, standard_error

# input_ids int64 [B, L] -> logits [B, L, V], any floating dtype. Must not keep a gradient graph
# (zq.eval.adapt.decoder_logits makes one from a transformers model).
Logits = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]  # windows done, windows in all

CHUNK_BYTES = 64 << 20
CONVENTIONS = (
    "independent windows of {length} tokens, no BOS added, tokens 2..{length} of each predicted, "
    "float32 log-softmax, natural logarithm, standard errors over windows"
)


def perplexity(
    model: Logits, windows: Tensor, batch: int = 1, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of `model` on `windows` (int64 [W, L], L >= 2), `batch` windows per call.

    Raises ZqError on windows of fewer than two tokens and on logits that are NaN.
    """
    check_windows(windows)
    losses = torch.empty(windows.shape[0], windows.shape[1] - 1)
    for first, ids in batches(windows, batch):
        logits = model(ids)
        check_logits(logits, ids, "the model")
        for row in range(ids.shape[0]):
            for part in chunks(logits.shape[-1], ids.shape[1] - 1):
                log_p = logits[row, part].float().log_softmax(-1)
                losses[first + row, part] = pick(log_p, ids[row, 1:][part])
        check_finite(losses[first : first + ids.shape[0]], first, "the model")
        if progress:
            progress(first + ids.shape[0], windows.shape[0])
    return summarize(losses)


def summarize(losses: Tensor) -> Perplexity:
    """The report for negative log-likelihoods `losses` (float [W, L-1], nats)."""
    per_window = losses.double().mean(1)
    nll = per_window.mean().item()
    return Perplexity(
        nll=nll,
        nll_standard_error=standard_error(per_window),
        # exp overflows beyond 709 nats, which only a broken model reaches.
        ppl=math.exp(nll) if nll < 709 else math.inf,
        tokens=losses.numel(),
        windows=losses.shape[0],
        length=losses.shape[1] + 1,
        conventions=CONVENTIONS.format(length=losses.shape[1] + 1),
    )


def pick(log_p: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target: log_p [T, V], targets int64 [T] (any device) -> float [T] on the CPU."""
    return -log_p.gather(-1, targets.to(log_p.device)[:, None])[:, 0].cpu()


def batches(windows: Tensor, batch: int) -> Iterator[tuple[int, Tensor]]:
    """(index of the first window, windows [<= batch, L]) until all are through."""
    if batch < 1:
        raise ZqError(f"batch = {batch} is not allowed; give a whole number of at least 1")
    for first in range(0, windows.shape[0], batch):
        yield first, windows[first : first + batch]


def chunks(vocabulary: int, rows: int) -> Iterator[slice]:
    """Slices over `rows` rows of `vocabulary` float32 values, each below CHUNK_BYTES."""
    step = max(1, CHUNK_BYTES // (4 * vocabulary))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def check_windows(windows: Tensor) -> None:
    """Refuse windows in which nothing is predicted."""
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ZqError(
            f"windows of shape {list(windows.shape)} cannot be evaluated; "
            "allowed is [windows >= 1, tokens >= 2]"
        )


def check_logits(logits: Tensor, ids: Tensor, who: str) -> None:
    """Refuse logits of another shape than [B, L, V] for ids [B, L], or with V below an id."""
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ZqError(
            f"{who} gave {list(logits.shape)} for tokens {list(ids.shape)}, not one row of logits "
            "per token; perplexity needs a decoder (for encoders: hidden-state cosine)"
        )
    if (highest := int(ids.max())) >= logits.shape[-1]:
        raise ZqError(
            f"token id {highest} is outside of the {logits.shape[-1]} logits that {who} gave; "
            "use the tokenizer of this very model"
        )


def check_finite(losses: Tensor, first: int, who: str) -> None:
    """Refuse NaN: a mean over it would hide in which window the model broke."""
    if losses.isnan().any():
        window = first + int(losses.isnan().any(1).nonzero()[0])
        raise ZqError(
            f"{who} gave logits that are NaN in window {window}: it is broken "
            "(an overflow, or a NaN in a weight); run its audit, or evaluate it in float32"
        )
