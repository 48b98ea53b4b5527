"""Proxy quantization: the input columns that probably carry outliers stay in the dtype of the model.

The k-bit scaling laws (Dettmers and Zettlemoyer 2022, arXiv:2212.09720) found that hidden units whose weights
have a large standard deviation give activations with outliers. So of the layer that feeds an input
(zq/quantizers/feeders.py) the `share` of units with the largest deviations is taken, and these columns of the
next layer are not quantized. No data is needed. Where no layer feeds the inputs one by one, the deviations of
the layer's own columns decide.

The columns are stored beside the codes: it costs 16 bits more for each of their weights (the paper, which
leaves their codes out, counts 16 - k), and only zq's own format holds them.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from zq.errors import ZqError
from zq.quantizers.feeders import spread_of
from zq.quantizers.method import Block, Layer, Method, Needs
from zq.spec import Scheme


@dataclass(frozen=True, kw_only=True)
class Options:
    share: float = field(default=0.02, metadata={"range": (0.0, 0.5)})


def run(block: Block, options: Options) -> None:
    """Choose the columns of every site; the steps that quantize leave them as they are."""
    for place, site in enumerate(block.sites):
        spread = block.spreads[place] if block.spreads else None
        for layer in site:
            layer.places = columns(layer, spread, layer.scheme.weights.kept)


def columns(layer: Layer, spread: Tensor | None, count: int) -> Tensor:
    """int64 [count]: the inputs with the largest `spread` [K], that of the layer's own columns when None."""
    found = spread_of(layer.weight, True) if spread is None else spread
    return found.topk(count).indices.sort().values


def needs(options: Options) -> Needs:
    return Needs.SPREADS


def stores(scheme: Scheme, shape: tuple[int, int], options: Options) -> Scheme:
    """The scheme with the number of columns. Raises ZqError when the share is less than one column."""
    count = round(options.share * shape[1])
    if not count:
        raise ZqError(
            f"'share: {options.share}' of step 'proxy' is less than one of {shape[1]} columns; give at least "
            f"{1 / shape[1]:.4f}"
        )
    return replace(scheme, weights=replace(scheme.weights, kept=count))


METHOD = Method(name="proxy", options=Options, needs=needs, run=run, stores=stores)
