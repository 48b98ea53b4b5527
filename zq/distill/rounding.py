"""Learned rounding and scales of one linear layer, starting exactly at a given quantization.

    u = latent / s(t) + V,    q = clamp(round(u) + z),    W^ = (q - z) s(t),    s(t) = s_0 (1 + t)

With V = 0 and t = 0 this is the quantization it starts from (GPTQ's latent rounds to GPTQ's codes). V counts
in steps of the grid, so one rate fits every layer (SignRound, arXiv:2309.05516); t changes the scale of a
group, up or down. Gradients pass the rounding straight through:

    dL/dV = s dL/dW^ inside the range, else 0        dL/ds = sum over the group of dL/dW^ (q - z - u_0),
                                                     u_0 = latent / s inside the range, else 0

Two-level scales stay as they were chosen and only the rounding learns: moved to the nearest that can be
stored, they lose more than they gained (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zq.numerics.groups import group, grouped_scale, ungroup
from zq.numerics.qtensor import QTensor, assemble
from zq.numerics.scales import Scale, int_range
from zq.quantizers.method import Layer


class LearnedRounding:
    """The trainable state of one layer. `parameters` are (V [R, G, S], t [R, G, 1]), float32."""

    def __init__(self, layer: Layer) -> None:
        q = layer.quantized
        assert q is not None
        assert q.spec.info.is_int
        self.layer, self.spec, self.shape = layer, q.spec, q.shape
        self.dtype = q.scale.dtype
        source = layer.latent if layer.latent is not None else layer.original
        self.latent = group(source.float(), q.spec).contiguous()
        self.scale = grouped_scale(q.scale, q.spec).float()
        self.sub = None if q.sub is None else q.sub.int()
        self.unit = (self.scale if self.sub is None else self.scale * self.sub).unsqueeze(-1)
        self.zero = None if q.zero is None else grouped_scale(q.zero, q.spec).float().unsqueeze(-1)
        self.offset = torch.zeros_like(self.latent, requires_grad=True)
        self.stretch = torch.zeros_like(self.unit, requires_grad=True)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.offset, self.stretch]

    def weight(self) -> Tensor:
        """W^ [N, K] in float32, differentiable in the parameters."""
        bounds = int_range(self.spec)
        stretch = self.stretch * 0 if self.spec.two_level else self.stretch
        dense = _Round.apply(self.latent, self.offset, self.unit, stretch, self.zero, bounds)
        return ungroup(dense, self.shape, self.spec)  # type: ignore[arg-type]

    @torch.no_grad()
    def harden(self) -> QTensor:
        """The quantization that the parameters stand for, scales in their stored dtype."""
        stored = self.scale
        if not self.spec.two_level:
            stored = (self.scale * (1 + self.stretch.squeeze(-1))).to(self.dtype).float()
        scale = Scale(stored, None if self.zero is None else self.zero.squeeze(-1).int(), self.sub)
        u = self.latent / scale.step.unsqueeze(-1) + self.offset
        q = u.round_()
        if self.zero is not None:
            q = q + self.zero
        codes = q.clamp_(*int_range(self.spec)).to(torch.int8)
        return assemble(codes, scale, self.spec, self.shape, self.dtype)

    def state(self) -> list[Tensor]:
        """A copy of the parameters, for `restore`."""
        return [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def restore(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, state, strict=True):
            parameter.copy_(value)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent, offset, unit, stretch, zero, bounds):  # type: ignore[override]
        low, high = bounds
        step = unit * (1 + stretch)
        ideal = latent / step
        u = ideal + offset
        q = torch.round(u)
        if zero is not None:
            q = q + zero
            u = u + zero
        inside = (u >= low - 0.5) & (u <= high + 0.5)
        q = q.clamp_(low, high)
        if zero is not None:
            q = q - zero
        residual = q - torch.where(inside, ideal, 0)
        ctx.save_for_backward(residual, inside, step, unit)
        return q * step

    @staticmethod
    def backward(ctx: Any, grad):  # type: ignore[override]
        residual, inside, step, unit = ctx.saved_tensors
        to_offset = torch.where(inside, grad * step, 0)
        to_stretch = (grad * residual).sum(-1, keepdim=True) * unit
        return None, to_offset, None, to_stretch, None, None
