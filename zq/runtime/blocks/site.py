"""Products that read the same rows, and what comes before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zq.runtime.merge import mergeable, merged
from zq.runtime.rows import Rows, quantized
from zq.runtime.serving import ServedLinear

HALVES = (torch.bfloat16, torch.float16)
MULTIPLE = 16  # of K, in the operators
GELU = {  # class of an activation -> `approximate` of the same function
    "GELUActivation": "none",
    "GELU": "none",
    "NewGELUActivation": "tanh",
    "GELUTanh": "tanh",
    "PytorchGELUTanh": "tanh",
    "FastGELUActivation": "tanh",
    "AccurateGELUActivation": "tanh",
    "BloomGelu": "tanh",
}
SILU = ("SiLU", "SiLUActivation")


class Site(nn.Module):
    """Linears with one input, as one product where their schemes allow it.

    takes: what all of them want their rows quantized to (torch.int8, torch.float8_e4m3fn), or None: rows go
    in as they are, and each linear sees to its own.
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        super().__init__()
        self.merged = len(linears) > 1 and mergeable(linears)
        one = [merged(linears)] if self.merged else linears  # type: ignore[arg-type]
        self.linears: Any = nn.ModuleList(one)
        wanted = {x.takes if isinstance(x, ServedLinear) else None for x in one}
        self.takes: torch.dtype | None = wanted.pop() if len(wanted) == 1 else None

    def forward(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        """rows as they are, or as `takes` says -> [M, all outputs one behind the other] in `dtype`."""
        if self.takes is None:
            made = [linear(rows.x) for linear in self.linears]
        else:
            rows = quantized(rows, self.takes)
            made = [linear.served.product(rows, linear.bias, dtype) for linear in self.linears]
        return made[0] if len(made) == 1 else torch.cat(made, -1)


class Norm(nn.Module):
    """RMSNorm or LayerNorm with what follows it: the rows come out as `takes` says, in one operator.

    post: what it gives is the next residual as well, see `both`.
    """

    def __init__(self, norm: Any, takes: torch.dtype | None, post: bool = False) -> None:
        super().__init__()
        self.post = post
        self.weight: Tensor | None = norm.weight
        self.bias: Tensor | None = getattr(norm, "bias", None)
        self.layer = isinstance(norm, nn.LayerNorm)
        self.eps: float = norm.eps if self.layer else norm.variance_epsilon
        self.size = int(norm.normalized_shape[-1] if self.layer else norm.weight.shape[0])
        self.takes: torch.dtype | None = None
        self.read_as(takes)

    def read_as(self, takes: torch.dtype | None) -> None:
        """What the reader of its rows takes, from now on; rows stay as they are where no operator does it."""
        fits = self.weight is not None and self.weight.dtype in HALVES and self.size % MULTIPLE == 0
        affine = fits and (self.bias is not None if self.layer else not self.post)
        self.takes = takes if affine else None

    @property
    def units(self) -> tuple[str, ...]:
        """What the compile units of its operators begin with."""
        if self.post:
            return ("postlayernorm",)
        return ("layernorm", "addlayernorm") if self.layer else ("rmsnorm", "addrmsnorm")

    def forward(self, x: Tensor) -> Rows:
        """x [M, K]."""
        if self.takes is None or self.weight is None:
            return Rows(self.plain(x))
        if self.bias is None:
            return Rows(*torch.ops.zq.rms_norm_quant(x, self.weight, self.eps, self.takes))
        return Rows(*torch.ops.zq.layer_norm_quant(x, self.weight, self.bias, self.eps, self.takes))

    def after(self, x: Tensor, residual: Tensor) -> tuple[Rows, Tensor]:
        """x, residual [M, K] -> (rows of the norm of their sum, their sum)."""
        if self.takes is None or self.weight is None:
            total = residual + x
            return Rows(self.plain(total)), total
        if self.bias is None:
            made = torch.ops.zq.add_rms_norm_quant(x, residual, self.weight, self.eps, self.takes)
        else:
            given = (x, residual, self.weight, self.bias, self.eps, self.takes)
            made = torch.ops.zq.add_layer_norm_quant(*given)
        return Rows(*made[:3]), made[3]

    def both(self, x: Tensor, residual: Tensor) -> tuple[Rows, Tensor]:
        """x, residual [M, K] -> (rows of the norm of their sum, the same norm in 16 bits). `post` only."""
        if self.takes is None or self.weight is None or self.bias is None:
            y = self.plain(residual + x)
            return Rows(y), y
        given = (x, residual, self.weight, self.bias, self.eps, self.takes)
        made = torch.ops.zq.post_layer_norm_quant(*given)
        return Rows(*made[:3]), made[3]

    def plain(self, x: Tensor) -> Tensor:
        if self.layer:
            return nn.functional.layer_norm(x, (self.size,), self.weight, self.bias, self.eps)
        return nn.functional.rms_norm(x, (self.size,), self.weight, self.eps)


class Activation(nn.Module):
    """What lies between up and down, with the quantization for down where there is an operator of both."""

    def __init__(self, function: Any, gated: bool, takes: torch.dtype | None, size: int) -> None:
        super().__init__()
        name = type(function).__name__
        self.function, self.gated = function, gated
        self.approximate = GELU.get(name, "")
        known = name in SILU if gated else bool(self.approximate)
        self.takes = takes if known and size % MULTIPLE == 0 else None

    @property
    def units(self) -> tuple[str, ...]:
        if self.gated:
            return ("silumul",)
        return ("gelunew" if self.approximate == "tanh" else "gelu",)

    def forward(self, x: Tensor) -> Rows:
        """x [M, K], gated [M, 2 K]: gate and up."""
        if self.takes is not None and x.dtype in HALVES:
            if self.gated:
                return Rows(*torch.ops.zq.silu_mul_quant(x, self.takes))
            return Rows(*torch.ops.zq.gelu_quant(x, self.approximate, self.takes))
        if not self.gated:
            return Rows(self.function(x))
        gate, up = x.chunk(2, -1)
        return Rows(self.function(gate) * up)
