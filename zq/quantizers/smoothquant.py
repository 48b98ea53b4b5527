"""SmoothQuant: scales that move the outliers of activations into the weights (Xiao et al. 2022,
arXiv:2211.10438).

    s_j = max |X_j|^alpha / max |W_j|^(1 - alpha)

for every link of the block: X is what its consumers read on the calibration tokens that come through the
quantized blocks before this one, W all their rows. Normalised by sqrt(max s min s); channels that are never
used keep 1. With `search`, alpha is chosen per link from 0, 0.1, ... 0.9 and no change at all, by the error
of the block's output (quantizers/search.py); `alpha` is not used then.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zq.numerics.qtensor import SCALES
from zq.quantizers.fold import fold_and_note, shared
from zq.quantizers.method import Block, Method, Needs
from zq.quantizers.search import Trial, floored, input_magnitudes, normalised, weight_magnitudes

GRID = tuple(i / 10 for i in range(10))


@dataclass(frozen=True, kw_only=True)
class Options:
    alpha: float = field(default=0.5, metadata={"range": (0.0, 1.0)})
    search: bool = False
    windows: int = field(default=8, metadata={"range": (1, 1 << 20)})
    scale: str = field(default="mse", metadata={"allowed": tuple(SCALES)})

    @property
    def tries(self) -> int:
        return len(GRID) + 1 if self.search else 0


def smooth(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Scales [K] from max |X_j| and max |W_j|, both [K] float32 and not negative; 1 where either is 0."""
    used = (inputs > 0) & (weights > 0)
    return normalised((floored(inputs) ** alpha / floored(weights) ** (1 - alpha)).where(used, 0.0))


def run(block: Block, options: Options) -> None:
    """Fold the scales of every link, in the order in which the block computes."""
    if not block.links:
        return
    magnitudes = input_magnitudes(block)
    trial = Trial(block, options.windows, options.scale) if options.search else None
    for link, (inputs, _) in zip(block.links, magnitudes, strict=True):
        inputs, weights = shared(inputs, link), shared(weight_magnitudes(link)[0], link)
        alpha: float | None = options.alpha
        errors: dict[str, Any] = {}
        if trial is not None:
            alpha, errors = trial.choose(link, {a: smooth(inputs, weights, a) for a in GRID})
        scale = None if alpha is None else smooth(inputs, weights, alpha)
        fact = {"step": METHOD.name, "producer": link.name, "alpha": alpha, **errors}
        fold_and_note(block, link, scale, fact)


def needs(options: Options) -> Needs:
    return Needs.INPUTS | Needs.LINKS


METHOD = Method(name="smoothquant", options=Options, needs=needs, run=run)
