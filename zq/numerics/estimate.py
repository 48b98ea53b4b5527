"""Code values estimated from the data: one increasing list for a tensor, or one for each of its rows.

Both work on normalised values z in [-1, 1] (value / scale of its group) and give 2^k values in [-1, 1].

    quantile   q_i = [Q(i / n) + Q((i+1) / n)] / 2, n = 2^k, i = 0 .. n-1, Q the quantile function of z:
               every code is used equally often (Dettmers and Zettlemoyer 2022, arXiv:2212.09720, eq. 6, which
               divides by n + 1 and so has one interval more than codes). The value nearest to zero becomes
               zero, and all are divided by the largest magnitude.
    kmeans     Lloyd's algorithm, from the quantiles and from a start whose density is the cube root of that
               of z (best for many values: Panter and Dite 1951), whichever ends better, each z
               weighed by its scale squared and the importance of its input, so that the squared error of the
               weights falls (SqueezeLLM, arXiv:2306.07629).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.formats import FormatInfo

ROUNDS = 30
BINS = 1024  # of the histogram that k-means starts from
SAMPLE = 1 << 22  # at most so many values are looked at, evenly chosen from every row


def estimate(z: Tensor, info: FormatInfo, weight: Tensor | None = None) -> Tensor:
    """z [C, M] float32 normalised values -> [C, 2^bits] float32, increasing (values may repeat).

    `weight` [C, M] >= 0 counts for k-means only.
    """
    stride = -(-z.shape[1] // SAMPLE)
    rows = max(1, SAMPLE // z.shape[1])  # at once: sorting takes several times the memory of its input
    found = []
    for first in range(0, len(z), rows):
        part = slice(first, first + rows)
        found.append(_rows(z[part, ::stride], info, None if weight is None else weight[part, ::stride]))
    return torch.cat(found)


def _rows(z: Tensor, info: FormatInfo, weight: Tensor | None) -> Tensor:
    ordered, order = z.sort(-1)
    values = quantiles(ordered, 1 << info.bits)
    if info.kind == "kmeans":
        weight = torch.ones_like(z) if weight is None else weight.gather(-1, order)
        return lloyd(ordered, [start(ordered, len(values[0]), weight), values], weight)
    values = values.scatter(-1, values.abs().argmin(-1, keepdim=True), 0.0)
    top = values.abs().amax(-1, keepdim=True)
    return values / torch.where(top == 0, 1, top)


def quantiles(ordered: Tensor, count: int) -> Tensor:
    """Sorted [C, M] -> [C, count], the means of neighbours among the quantiles 0, 1/count, .. 1."""
    last = ordered.shape[-1] - 1
    places = torch.linspace(0, last, count + 1, dtype=torch.float64, device=ordered.device)
    low = places.floor().long()
    share = (places - low).float()
    edges = ordered[:, low] * (1 - share) + ordered[:, (low + 1).clamp_max(last)] * share
    return (edges[:, 1:] + edges[:, :-1]) / 2


def start(ordered: Tensor, count: int, weight: Tensor) -> Tensor:
    """Sorted [C, M] with weights [C, M] -> [C, count] at even steps of the integral of density^(1/3)."""
    low, high = ordered[:, :1], ordered[:, -1:]
    edges = low + (high - low) * torch.linspace(0, 1, BINS + 1, device=ordered.device)
    below = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
    mass = below.gather(-1, torch.searchsorted(ordered, edges, right=True)).diff(dim=-1, prepend=below[:, :1])
    share = mass[:, 1:].clamp_min(0).pow(1 / 3).cumsum(-1)
    wanted = (torch.arange(count, device=ordered.device) + 0.5) / count * share[:, -1:]
    found = torch.searchsorted(share, wanted).clamp_max(BINS - 1)
    return ((edges[:, 1:] + edges[:, :-1]) / 2).gather(-1, found)


def lloyd(ordered: Tensor, starts: list[Tensor], weight: Tensor) -> Tensor:
    """Sorted [C, M] with weights [C, M] -> [C, V], for each row from whichever start [C, V] ends better.

    What rounds to a value is a piece of the sorted row, so its mean is a difference of running sums. A
    value to which nothing rounds stays where it is.
    """
    mass = torch.nn.functional.pad(weight.double().cumsum(-1), (1, 0))
    moment = torch.nn.functional.pad((weight.double() * ordered).cumsum(-1), (1, 0))
    ends = torch.tensor([0, ordered.shape[-1]], device=ordered.device).expand(len(ordered), 2)

    def shares(values: Tensor) -> tuple[Tensor, Tensor]:
        """Mass and moment [C, V] of what rounds to each value."""
        cuts = torch.searchsorted(ordered, (values[:, 1:] + values[:, :-1]) / 2, right=True)
        cuts = torch.cat([ends[:, :1], cuts, ends[:, 1:]], -1)
        return mass.gather(-1, cuts).diff(dim=-1), moment.gather(-1, cuts).diff(dim=-1)

    best, least = (
        starts[0],
        torch.full((len(ordered), 1), torch.inf, dtype=torch.float64, device=ordered.device),
    )
    for values in starts:
        for _ in range(ROUNDS):
            share, total = shares(values)
            mean = total / share.clamp_min(torch.finfo(torch.float64).tiny)
            values = torch.where(share > 0, mean.float(), values).sort(-1).values
        share, total = shares(values)
        error = (values * (values * share - 2 * total)).sum(
            -1, keepdim=True
        )  # but for what all have in common
        best, least = torch.where(error < least, values, best), torch.minimum(error, least)
    return best.clamp(-1, 1)
