"""What a step that folds scales looks at: the inputs of each link, and the error that a scale would leave.

The error of a scale is measured on the output of the whole block: the link's consumers are rounded to
nearest under their own schemes, with their inputs quantized where the scheme says so, and everything else is
as it is. Nothing is changed meanwhile: the tried weights are passed to the block for one call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from zq.errors import ZqError
from zq.finite import finite
from zq.models.capture import run_block
from zq.numerics.qtensor import quantize
from zq.quantizers.fold import divided
from zq.quantizers.method import Block, BlockLink, quantized_inputs

FLOOR = 1e-5  # of the largest: what is smaller counts as this much, so no scale exceeds 1 / FLOOR of another


def input_magnitudes(block: Block) -> list[tuple[Tensor, Tensor]]:
    """Per link (max |x_j|, mean |x_j|), float32 [K], over all calibration tokens, of its consumers' input.

    Raises ZqError when an input holds NaN or Inf.
    """
    found = [(torch.zeros(len(x.channels), device=x.channels.device),) * 2 for x in block.links]
    tokens = 0

    def watch(i: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].reshape(-1, args[0].shape[-1]).float().abs()
            largest, total = found[i]
            found[i] = torch.maximum(largest, x.amax(0)), total + x.sum(0)

        return hook

    hooks = [x.consumers[0].module.register_forward_pre_hook(watch(i)) for i, x in enumerate(block.links)]
    try:
        for index, hidden in enumerate(block.inputs):
            tokens += hidden.shape[:-1].numel()
            block.run(hidden, index)
    finally:
        for hook in hooks:
            hook.remove()
    for link, (_, total) in zip(block.links, found, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise ZqError(
                f"the inputs of '{link.consumers[0].name}' hold NaN or Inf on the calibration tokens, so no "
                "scale fits them; drop the steps smoothquant and awq, or convert the model to bfloat16"
            )
    return [(largest, total / tokens) for largest, total in found]


def weight_magnitudes(link: BlockLink) -> tuple[Tensor, Tensor]:
    """(max |W_j|, mean |W_j|), float32 [K], over the rows of all consumers."""
    weights = [layer.weight.float().abs() for layer in link.consumers]
    largest = torch.stack([w.amax(0) for w in weights]).amax(0)
    return largest, torch.stack([w.sum(0) for w in weights]).sum(0) / sum(len(w) for w in weights)


def floored(magnitudes: Tensor) -> Tensor:
    """At least FLOOR times the largest; zeros (dead channels) stay."""
    return torch.where(magnitudes > 0, magnitudes.clamp_min(float(magnitudes.max()) * FLOOR), magnitudes)


def normalised(scale: Tensor) -> Tensor:
    """scale [K] divided by sqrt(max min) of what is finite and positive; 1 elsewhere."""
    live = torch.isfinite(scale) & (scale > 0)
    if not bool(live.any()):
        return torch.ones_like(scale)
    middle = (scale[live].max() * scale[live].min()).sqrt()
    return torch.where(live, scale / middle, 1.0)


class Trial:
    """The block's output on some windows as it is now, to compare with.

    windows: how many at most, in whole batches, the first in any case. scale: how the scales of tried weights
    are chosen (`zq.numerics.qtensor.SCALES`).
    """

    def __init__(self, block: Block, windows: int, scale: str) -> None:
        self.block, self.scale = block, scale
        self.wanted = {i: block.run(block.inputs[i], i) for i in block.batches(windows)}
        self.power = sum(float(y.float().square().sum()) for y in self.wanted.values())

    def choose(
        self, link: BlockLink, candidates: Mapping[float, Tensor]
    ) -> tuple[float | None, dict[str, float | None]]:
        """The key of the best scale, None when none is better than no change; errors before and after,
        relative to the output (None: not finite)."""
        best, start = None, self.error(link, None)
        least = start
        for key, scale in candidates.items():
            error = self.error(link, scale)
            if error < least:
                best, least = key, error
        return best, finite({"start": start, "end": least})

    def error(self, link: BlockLink, scale: Tensor | None) -> float:
        """||y - y_float||^2 / ||y_float||^2 of the block with this scale [K] folded and the consumers
        quantized; infinity when it overflows."""
        tried = self._tried(link, scale)
        module = self.block.module
        assert module is not None
        error = 0.0
        with quantized_inputs(list(link.consumers)):
            for i, wanted in self.wanted.items():
                out = run_block(module, self.block.inputs[i], self.block.calls[i], tried)
                error += float((out.float() - wanted.float()).square().sum())
        error /= max(self.power, 1e-30)
        return error if math.isfinite(error) else math.inf

    def _tried(self, link: BlockLink, scale: Tensor | None) -> dict[str, Tensor]:
        """Parameters of the block, by their names in it, under this scale."""
        tried: dict[str, Tensor] = {}
        factor: Tensor | float = 1.0
        if scale is not None:
            new = divided(link, scale)
            factor = new.scale
            producer = link.name.removeprefix(f"{self.block.name}.")
            tried[f"{producer}.weight"] = new.weight.T if link.transposed else new.weight
            if new.bias is not None:
                tried[f"{producer}.bias"] = new.bias
        for layer in link.consumers:
            try:
                weight, spec = layer.weight.float() * factor, layer.scheme.weights
                q = quantize(weight, spec, self.scale, self.block.scale_dtype, places=layer.places)
            except ZqError as error:
                raise ZqError(f"'{layer.name}.weight': {error}") from None
            dense = q.dequantize()
            name = layer.name.removeprefix(f"{self.block.name}.")
            tried[f"{name}.weight"] = dense.T if layer.transposed else dense
        return {name: value.to(self.block.scale_dtype) for name, value in tried.items()}
