"""L1 normalisation: the mean magnitude in the place of the standard deviation (ShiftQuant, arXiv:2411.10948).

    y = (x - mean) / (c mean|x - mean| + eps) * weight + bias,    c = sqrt(pi / 2)

For normally distributed x both denominators are alike: E|x| = sigma sqrt(2 / pi). It needs no squares and no
root, which integer hardware is short of. In a pretrained model it is another function, which has to be
repaired or trained. RMS normalisation subtracts no mean, and neither does its L1 form.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

CONVERSION = math.sqrt(math.pi / 2)


class L1Norm(nn.Module):
    """Over the last dimension. centered: subtract the mean (LayerNorm); weight, bias: [D] or None."""

    def __init__(
        self, weight: Tensor | None, bias: Tensor | None = None, eps: float = 1e-6, centered: bool = True
    ) -> None:
        super().__init__()
        self.weight, self.bias = (None if p is None else nn.Parameter(p) for p in (weight, bias))
        self.eps, self.centered = eps, centered

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        if self.centered:
            wide = wide - wide.mean(-1, keepdim=True)
        wide = wide / (CONVERSION * wide.abs().mean(-1, keepdim=True) + self.eps)
        wide = wide.to(x.dtype)
        if self.weight is not None:
            wide = wide * self.weight
        return wide if self.bias is None else wide + self.bias


def l1_norms(model: nn.Module) -> list[str]:
    """Replace every LayerNorm and RMSNorm of torch or transformers by its L1 form, in place; the names."""
    found = []
    for name, module in list(model.named_modules()):
        layer_norm = isinstance(module, nn.LayerNorm)
        if not (layer_norm or type(module).__name__.endswith("RMSNorm")):
            continue
        parent, _, leaf = name.rpartition(".")
        own: Any = module
        eps = next((v for k in ("eps", "variance_epsilon") if (v := getattr(own, k, None)) is not None), 1e-6)
        weight, bias = own.weight, getattr(own, "bias", None)
        replaced = L1Norm(
            None if weight is None else weight.detach(),
            None if bias is None else bias.detach(),
            math.sqrt(eps) if eps else torch.finfo(torch.float32).eps,
            centered=layer_norm,
        )
        setattr(model.get_submodule(parent), leaf, replaced.train(own.training))
        found.append(name)
    return found
