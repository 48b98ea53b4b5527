"""Learned rounding and scales of one linear layer, starting exactly at a given quantization.

    u = latent / s(t) + V,    q = clamp(round(u) + z),    W^ = (q - z) s(t),    s(t) = s_0 (1 + t)

With V = 0 and t = 0 this is the quantization it starts from (GPTQ's latent rounds to GPTQ's codes). V counts
in steps of the grid, so one rate fits every layer (SignRound, arXiv:2309.05516); t changes the scale of a
group, up or down. Gradients pass the rounding straight through:

    dL/dV = s dL/dW^ inside the range, else 0        dL/ds = sum over the group of dL/dW^ (q - z - u_0),
                                                     u_0 = latent / s inside the range, else 0

Two-level scales stay as they were chosen and only the rounding learns: moved to the nearest that can be
stored, they lose more than they gained (docs/log.md). Both gradients are followed by their sign only. So one
pass over the weights takes dL/dW^ and gives the next W^; on a CPU it goes over a few rows at a time, which
stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from zq.numerics.groups import group, grouped_scale, ungroup
from zq.numerics.qtensor import QTensor, assemble
from zq.numerics.scales import Scale, int_range, rounded
from zq.quantizers.method import Layer
from zq.spec import TensorSpec

CACHED = 1 << 16  # values that are worked on at once on a CPU


def learnable(spec: TensorSpec) -> bool:
    """Whether the rounding can be learned: integers whose steps are plain or two-level scales."""
    plain = not (spec.inner or spec.center or spec.kept) and spec.layout.kind != "rank1"
    return spec.info.is_int and plain


class LearnedRounding:
    """The trainable state of one layer: `offset` V [R, G, S] and `stretch` t [R, G, 1], float32. Over
    all iterations an offset can move by at most `offset_rate` / 2 steps of the grid, a scale by
    `stretch_rate` / 2 of itself."""

    def __init__(self, layer: Layer, offset_rate: float = 1.0, stretch_rate: float = 0.2) -> None:
        q = layer.quantized
        assert q is not None
        assert learnable(q.spec)
        self.layer, self.spec, self.shape = layer, q.spec, q.shape
        self.offset_rate, self.stretch_rate = offset_rate, stretch_rate
        self.dtype = q.scale.dtype
        source = layer.latent if layer.latent is not None else layer.original
        self.latent = group(source.float(), q.spec).contiguous()
        self.scale = grouped_scale(q.scale, q.spec).float()
        self.sub = None if q.sub is None else q.sub.int()
        unit = self.scale if self.sub is None else self.scale * self.sub
        self.unit = unit.unsqueeze(-1)
        self.zero = None if q.zero is None else grouped_scale(q.zero, q.spec).float().unsqueeze(-1)
        self.offset = torch.zeros_like(self.latent)
        self.stretch = torch.zeros_like(self.unit)

    def weight(self) -> Tensor:
        """W^ [N, K] in float32."""
        dense = torch.cat([self._values(rows) for rows in self._parts()])
        return ungroup(dense, self.shape, self.spec)

    @property
    def parameter(self) -> Tensor:
        """What the module computes with."""
        weight = self.layer.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def follow(self, gradient: Tensor, fall: Tensor) -> None:
        """One iteration against the gradient of `parameter`; `fall` is its share of the rates."""
        dense = gradient.T if self.layer.transposed else gradient
        self.update(dense, self.offset_rate * fall, self.stretch_rate * fall)

    def soften(self) -> None:
        """Let the layer compute with the state as it is now."""
        self.layer.compute_with(self.weight())

    def settle(self) -> None:
        """Let the layer be what the state stands for, as it would be written."""
        self.layer.replace(self.harden())

    def update(self, gradient: Tensor, offset_step: Tensor | float, stretch_step: Tensor | float) -> None:
        """Go against dL/dW^ `gradient` [N, K]: V by `offset_step`, t by `stretch_step`; the layer computes
        with the new W^ afterwards."""
        grouped = group(gradient, self.spec)
        parts = []
        for rows in self._parts():
            self._descend(rows, grouped[rows].float(), offset_step, stretch_step)
            parts.append(self._values(rows).to(gradient.dtype))
        self.layer.compute_with(ungroup(torch.cat(parts), self.shape, self.spec))

    def _parts(self) -> Iterator[slice]:
        rows = self.latent.shape[0]
        size = rows if self.latent.is_cuda else max(1, CACHED * rows // self.latent.numel())
        return (slice(first, first + size) for first in range(0, rows, size))

    def _descend(
        self, rows: slice, gradient: Tensor, offset_step: Tensor | float, stretch_step: Tensor | float
    ) -> None:
        low, high = int_range(self.spec)
        unit, stretch, offset = self.unit[rows], self.stretch[rows], self.offset[rows]
        step = unit * (1 + stretch)
        ideal = self.latent[rows] / step
        u = ideal + offset
        rounded = torch.round(u)
        if self.zero is not None:
            u, rounded = u + self.zero[rows], rounded + self.zero[rows]
        inside = (u >= low - 0.5) & (u <= high + 0.5)
        residual = rounded.clamp_(low, high)
        if self.zero is not None:
            residual = residual - self.zero[rows]
        residual = residual - ideal * inside
        slope = (gradient * residual).sum(-1, keepdim=True) * unit
        offset.sub_((gradient * step).sign_().mul_(inside).mul_(offset_step))
        if not self.spec.two_level:
            stretch.sub_(slope.sign_().mul_(stretch_step))

    def _values(self, rows: slice) -> Tensor:
        """W^ of some rows, grouped [r, G, S]."""
        step = self.unit[rows] * (1 + self.stretch[rows])
        q = torch.round((self.latent[rows] / step).add_(self.offset[rows]))
        zero = 0 if self.zero is None else self.zero[rows]
        return (q + zero).clamp_(*int_range(self.spec)).sub_(zero).mul_(step)

    def harden(self) -> QTensor:
        """The quantization that the state stands for, scales in their stored dtype."""
        stored = self.scale
        if not self.spec.two_level:
            stored = rounded(self.scale * (1 + self.stretch.squeeze(-1)), self.spec, self.dtype)
        scale = Scale(stored, None if self.zero is None else self.zero.squeeze(-1).int(), self.sub)
        q = (self.latent / scale.step.unsqueeze(-1)).add_(self.offset).round_()
        if self.zero is not None:
            q = q + self.zero
        codes = q.clamp_(*int_range(self.spec)).to(torch.int8)
        return assemble(codes, scale, self.spec, self.shape, self.dtype)

    def state(self) -> tuple[Tensor, ...]:
        """A copy of the state, for `restore`."""
        return self.offset.clone(), self.stretch.clone()

    def restore(self, state: tuple[Tensor, ...]) -> None:
        self.offset.copy_(state[0])
        self.stretch.copy_(state[1])
