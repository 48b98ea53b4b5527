"""Pareto fronts, and which width wins at which budget, with bootstrap intervals: tensors in, numbers out.

Every cell of a model is measured on the same windows of text, and what differs between windows differs for
all cells alike. So windows are drawn with replacement once per resample, the same for every cell (a paired
bootstrap, Efron and Tibshirani 1993), and the front and the winners are found anew in each resample: a share
of resamples says how far the windows decide between two cells, which two separate intervals do not.

Lower is better everywhere; negate an accuracy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RESAMPLES = 2000
SEED = 0


def resampled(values: Tensor, resamples: int = RESAMPLES, seed: int = SEED) -> Tensor:
    """Means of `values` float64 [N, W] over W draws with replacement: float64 [resamples, N], each row of the
    same draws for all N. The same arguments give the same numbers on every machine."""
    count = values.shape[1]
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (resamples, count), generator=generator)
    weights = torch.zeros(resamples, count, dtype=torch.float64)
    weights.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    return weights @ values.double().T / count


def interval(means: Tensor, share: float = 0.95) -> tuple[float, float]:
    """The middle `share` of means [R]: percentiles, linearly interpolated."""
    edge = (1 - share) / 2
    low, high = torch.quantile(means.double(), torch.tensor([edge, 1 - edge], dtype=torch.float64)).tolist()
    return low, high


def on_front(sizes: Tensor, values: Tensor) -> Tensor:
    """Which of N cells no other dominates: sizes [N], values [..., N] -> bool [..., N].

    A cell is dominated when another is no larger and better, or smaller and no worse.
    """
    result = torch.ones_like(values, dtype=torch.bool)
    for i in range(len(sizes)):
        no_larger, smaller = sizes <= sizes[i], sizes < sizes[i]
        better = (values[..., no_larger] < values[..., i : i + 1]).any(-1)
        as_good = (values[..., smaller] <= values[..., i : i + 1]).any(-1)
        result[..., i] = ~(better | as_good)
    return result


def best_within(sizes: Tensor, values: Tensor, budget: float) -> Tensor:
    """The best cell of at most `budget`: values [..., N] -> index int64 [...]; the smaller of two as good.

    At least one cell must fit.
    """
    order = sizes.argsort(stable=True)
    fits = order[sizes[order] <= budget]
    return fits[values[..., fits].argmin(-1)]


def shares(winners: Tensor, groups: list[int]) -> dict[int, float]:
    """In which share of `winners` (indices [R]) a cell of each group wins, the largest share first."""
    won = torch.tensor(groups)[winners]
    found = {int(group): (won == group).double().mean().item() for group in won.unique()}
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def budgets(sizes: Tensor, count: int = 12) -> list[int]:
    """`count` budgets from the smallest cell to the largest, equal ratios apart, each rounded up to three
    significant digits."""
    low, high = float(sizes.min()), float(sizes.max())
    found = [low * (high / low) ** (i / (count - 1)) for i in range(count)] if high > low else [low]
    return list(dict.fromkeys(_rounded_up(size) for size in found))


def _rounded_up(size: float) -> int:
    digit = 10 ** max(0, math.floor(math.log10(size)) - 2)
    return math.ceil(round(size / digit, 9)) * digit
