"""AWQ: scales that give the weights that meet large activations more of the grid (Lin et al. 2023,
arXiv:2306.00978).

    s_j = mean |X_j|^r,   r in {0, 0.05, ..., 0.95}        duo:  s_j = mean |X_j|^r / mean |W_j|^(1 - r)

for every link of the block, normalised by sqrt(max s min s), with the r that leaves the least error of the
block's output (quantizers/search.py) on at most `windows` calibration windows. r = 0 is no change, and `duo`
may choose none either, so on these windows the result is never worse. Weights are measured as rounded to
nearest by their own scheme, activations quantized where the scheme quantizes them.

`where: activations` leaves links alone that lead to a layer whose activations stay in 16 bits: before learned
rounding the scales are worth it for the outliers of activations only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import compress

import torch
from torch import Tensor

from zq.numerics.qtensor import SCALES
from zq.quantizers.fold import fold_and_note, shared
from zq.quantizers.method import Block, Method, Needs
from zq.quantizers.search import Trial, floored, input_magnitudes, normalised, weight_magnitudes

GRID = tuple(i / 20 for i in range(20))


@dataclass(frozen=True, kw_only=True)
class Options:
    scale: str = field(default="mse", metadata={"allowed": tuple(SCALES)})
    windows: int = field(default=8, metadata={"range": (1, 1 << 20)})
    duo: bool = False
    where: str = field(default="all", metadata={"allowed": ("all", "activations")})

    @property
    def tries(self) -> int:
        return len(GRID)


def protect(inputs: Tensor, weights: Tensor | None, ratio: float) -> Tensor:
    """Scales [K] from mean |X_j| and, for the duo form, mean |W_j|, both [K] float32 and not negative; 1
    where either is 0."""
    used = inputs > 0 if weights is None else (inputs > 0) & (weights > 0)
    below = torch.ones_like(inputs) if weights is None else floored(weights) ** (1 - ratio)
    return normalised((floored(inputs) ** ratio / below).where(used, 0.0))


def run(block: Block, options: Options) -> None:
    """Choose and fold the scales of one link after the other, in the order in which the block computes."""
    wanted = [options.where == "all" or link.rounds for link in block.links]
    if not any(wanted):
        return
    magnitudes = input_magnitudes(block)
    trial = Trial(block, options.windows, options.scale)
    for link, (_, inputs) in compress(zip(block.links, magnitudes, strict=True), wanted):
        inputs = shared(inputs, link)
        weights = shared(weight_magnitudes(link)[1], link) if options.duo else None
        ratios = GRID if options.duo else GRID[1:]
        ratio, errors = trial.choose(link, {r: protect(inputs, weights, r) for r in ratios})
        scale = None if ratio is None else protect(inputs, weights, ratio)
        fact = {"step": METHOD.name, "producer": link.name, "ratio": ratio, **errors}
        fold_and_note(block, link, scale, fact)


def needs(options: Options) -> Needs:
    return Needs.INPUTS | Needs.LINKS | (Needs.ROUNDED if options.where == "activations" else Needs.NOTHING)


METHOD = Method(name="awq", options=Options, needs=needs, run=run)
