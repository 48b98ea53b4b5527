"""Round to nearest: every weight goes to the closest code of its group, no data needed.

    rounding: nearest      ties to even
              stochastic   up or down with the probability that keeps the mean, seeded per layer
    scale:    mse          the scale with the least squared error of each group (numerics/scales.py)
              absmax       the largest magnitude of the group on the end of the range

With groups along K and token-wise activations this is ZeroQuant's zero-cost setting
(Yao et al. 2022, arXiv:2206.01861, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from zq.errors import ZqError
from zq.numerics.qtensor import SCALES, quantize
from zq.quantizers.method import Block, Method, Needs


@dataclass(frozen=True, kw_only=True)
class Options:
    scale: str = field(default="mse", metadata={"allowed": tuple(SCALES)})
    rounding: str = field(default="nearest", metadata={"allowed": ("nearest", "stochastic")})


def run(block: Block, options: Options) -> None:
    """Quantize every layer of the block on its own."""
    for layer in block.layers:
        generator = block.generator(layer) if options.rounding == "stochastic" else None
        spec = layer.scheme.weights
        try:
            quantized = quantize(
                layer.weight, spec, options.scale, block.scale_dtype, generator, layer.places
            )
        except ZqError as error:
            raise ZqError(f"'{layer.name}.weight': {error}") from None
        layer.replace(quantized)


def needs(options: Options) -> Needs:
    return Needs.NOTHING


METHOD = Method(name="rtn", options=Options, needs=needs, run=run)
