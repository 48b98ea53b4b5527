"""Moving a scale from the output channels of a producer into the weights that read them.

    y = W x,   x = P(u)      ->      y = (W diag(s)) x',   x' = diag(1/s) P(u),   s > 0

with P a norm or a linear (its weight and bias divided by s), so the function of the block does not change. It
makes the consumers' inputs or weights easier to quantize (SmoothQuant, arXiv:2211.10438; AWQ,
arXiv:2306.00978).

What is rounded on the way:
    consumers   nothing: their folded weight is kept in float32 until it is quantized
    norm        the quotient is rounded to the dtype in which it is stored, and s becomes the ratio of old to
                new weight, so their product is exact; a norm's bias / s is rounded (half an ulp)
    linear      quantized itself: float32 as well; else weight / s is rounded to the stored dtype, like biases
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zq.quantizers.method import Block, BlockLink, twin


@dataclass(frozen=True)
class Divided:
    """What a scale makes of a producer.

    scale    [K] float32, by which the consumers' input channels are to be multiplied
    weight   [n] (norm) or [n, m] (linear), float32 holding values that can be stored
    bias     [n] float32 or None
    """

    scale: Tensor
    weight: Tensor
    bias: Tensor | None


def shared(values: Tensor, link: BlockLink) -> Tensor:
    """values [K] -> [K] with one value, the largest, for all input channels that one channel of the producer
    feeds (the query heads that share a value head); the same values where each feeds one."""
    pooled = values.new_zeros(int(link.channels.max()) + 1)
    pooled.scatter_reduce_(0, link.channels, values, "amax", include_self=False)
    return pooled[link.channels]


def divided(link: BlockLink, scale: Tensor) -> Divided:
    """The producer with its channels divided by `scale` [K] (positive, float32).

    The scale that comes back can differ from the one given: it is equal where channels must share one, large
    enough that no quotient leaves the range of the dtype, and exact for norms (1 where the weight is 0).
    """
    weight, bias = _rows(link), getattr(link.producer, "bias", None)
    bias = None if bias is None else bias.detach().float()
    parts = [weight.abs().reshape(len(weight), -1).amax(1), *([] if bias is None else [bias.abs()])]
    divisor = torch.ones_like(parts[0])
    divisor[link.channels] = shared(scale.float(), link)
    largest = torch.stack(parts).amax(0)
    divisor = torch.maximum(divisor, largest / min(torch.finfo(d).max for d in _dtypes(link)))
    quotient = weight / divisor.reshape(-1, *[1] * (weight.ndim - 1))
    if link.layer is None:
        quotient = _storable(quotient, link, "weight")
    if link.is_norm:
        exact = quotient != 0
        divisor = torch.where(exact, weight / quotient, 1.0)
        quotient = torch.where(exact, quotient, weight)
    return Divided(
        divisor[link.channels],
        quotient,
        None if bias is None else _storable(bias / divisor, link, "bias"),
    )


def fold(block: Block, link: BlockLink, scale: Tensor) -> Tensor:
    """Divide the producer's channels by `scale` [K] and multiply the consumers' inputs; in the teacher too,
    whose inputs must stay comparable. Returns the scale that was folded (see `divided`)."""
    new = _fold(link, scale)
    if block.teacher is not None:
        _fold(_of_teacher(block, block.teacher, link), new.scale)
    leaves = ["weight"] * (link.layer is None) + ["bias"] * (new.bias is not None)
    block.changed |= {f"{link.name}.{leaf}" for leaf in leaves}
    return new.scale


def fold_and_note(block: Block, link: BlockLink, scale: Tensor | None, fact: dict[str, Any]) -> None:
    """`fold`, unless nothing was chosen, and keep `fact` with the block's smoothing."""
    if scale is not None:
        fold(block, link, scale)
    block.facts.setdefault("smoothing", []).append(fact)


def _fold(link: BlockLink, scale: Tensor) -> Divided:
    new = divided(link, scale)
    if link.layer is not None:
        link.layer.fold(new.weight)
    else:
        _parameter(link.producer, "weight").copy_(new.weight.T if link.transposed else new.weight)
    if new.bias is not None:
        _parameter(link.producer, "bias").copy_(new.bias)
    for layer in link.consumers:
        layer.fold(layer.weight.float() * new.scale)
    return new


def _of_teacher(block: Block, teacher: nn.Module, link: BlockLink) -> BlockLink:
    """The same link of the teacher."""

    def of(module: nn.Module) -> nn.Module:
        return twin(block.module, teacher, module)

    return replace(
        link,
        producer=of(link.producer),
        layer=link.layer and replace(link.layer, module=of(link.layer.module), folded=None),
        consumers=tuple(replace(layer, module=of(layer.module), folded=None) for layer in link.consumers),
    )


def _rows(link: BlockLink) -> Tensor:
    """The producer's weight in float32, output channels first."""
    if link.layer is not None:
        return link.layer.weight.float()
    weight = _parameter(link.producer, "weight").float()
    return weight.T if link.transposed else weight


def _storable(values: Tensor, link: BlockLink, leaf: str) -> Tensor:
    """Rounded to what the output holds, then to what the module computes with; float32."""
    return values.to(link.stored[leaf]).to(_parameter(link.producer, leaf).dtype).float()


def _dtypes(link: BlockLink) -> set[torch.dtype]:
    return {*link.stored.values(), _parameter(link.producer, "weight").dtype}


def _parameter(module: nn.Module, leaf: str) -> Tensor:
    parameter = getattr(module, leaf)
    assert isinstance(parameter, Tensor)
    return parameter.detach()
