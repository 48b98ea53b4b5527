"""What a method is: options, what it needs to be given, and a function that works on one block.

The pipeline collects the union of all `needs`, provides it once, and calls `run` for every step in the
order of the recipe. A method sees one block and touches nothing else.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from zq.numerics.qtensor import QTensor
from zq.spec import Scheme


class Needs(enum.Flag):
    """What the pipeline must provide to a step."""

    NOTHING = 0
    INPUTS = enum.auto()  # calibration tokens run through the block: hidden states before and after


@dataclass
class Layer:
    """One linear layer that the recipe quantizes.

    module     nn.Linear, or transformers' Conv1D, whose weight is stored as [K, N] (`transposed`)
    quantized  what a step made of the weight; None until then
    """

    name: str
    kind: str | None
    module: nn.Module
    transposed: bool
    scheme: Scheme
    quantized: QTensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K], whatever the module stores."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    def replace(self, quantized: QTensor) -> None:
        """Keep the result and make the module compute with it, so that later steps see its error."""
        self.quantized = quantized
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        dense = quantized.dequantize(weight.dtype)
        weight.data.copy_(dense.T if self.transposed else dense)


@dataclass
class Block:
    """One transformer block (or the linear layers outside the blocks) while it is being quantized."""

    name: str
    module: nn.Module | None
    layers: list[Layer]
    scale_dtype: torch.dtype
    seed: int
    hidden: list[Tensor] = field(default_factory=list)

    def generator(self, layer: Layer) -> torch.Generator:
        """Random numbers that depend on the seed and the layer only, never on what ran before."""
        digest = hashlib.sha256(f"{self.seed}:{layer.name}".encode()).digest()
        generator = torch.Generator(device=layer.weight.device)
        generator.manual_seed(int.from_bytes(digest[:7], "little"))
        return generator


@dataclass(frozen=True)
class Method:
    """`options` is a frozen dataclass with defaults; `run(block, options)` quantizes `block.layers`."""

    name: str
    options: type
    needs: Needs
    run: Callable[[Block, Any], None]
