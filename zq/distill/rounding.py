"""Learned rounding and scales of one linear layer, starting exactly at a given quantization.

    u = place(latent / s(t)) + V,    q = clamp(round(u)),    W^ = value(q) s(t)

place and value number the values of the format (distill/grid.py); for integers u = latent / s + z + V and
W^ = (q - z) s. With V = 0 and t = 0 this is the quantization it starts from: where the latent of an earlier
step does not round to the codes at hand, it is moved to the nearest place that does. V counts in steps of the
grid, so one rate fits every layer (SignRound, arXiv:2309.05516); t changes the scale of a group,
s(t) = s_0 (1 + t). Gradients pass the rounding straight through:

    dL/dV = (gap of the grid) s dL/dW^ inside the range, else 0
    dL/ds = sum over the group of dL/dW^ (value(q) - x_0),    x_0 = latent / s inside the range, else 0

Both are followed by their sign only. So one pass over the weights takes dL/dW^ and gives the next W^; on a
CPU it goes over a few rows at a time, which stay in the cache. Scales of two levels move from one product
that can be stored to the next (distill/subs.py). Scales of power-of-two groups and rank-1 scales, which are
shared by values that would disagree, stay; so do means, code values and columns that are stored as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from zq.distill.grid import Grid
from zq.distill.subs import Subs
from zq.numerics.groups import group, stored_scale, ungroup
from zq.numerics.qtensor import QTensor, without
from zq.numerics.scales import store
from zq.quantizers.method import Layer

CACHED = 1 << 16  # values that are worked on at once on a CPU
INSIDE = 0.49  # how far from its number a place is put that did not round to it
LEAST = 0.05  # of itself remains of a scale


class LearnedRounding:
    """The trainable state of one layer: `offset` V [R, G, S] and `stretch` t [R, G, 1], float32. Over
    all iterations an offset can move by at most `offset_rate` / 2 steps of the grid, a scale by
    `stretch_rate` / 2 of itself up to 4 bits. Each bit more halves that, so that the end of the range
    never moves by more steps."""

    def __init__(self, layer: Layer, offset_rate: float = 1.0, stretch_rate: float = 0.2) -> None:
        q = layer.quantized
        assert q is not None
        self.layer, self.given, self.spec, self.shape = layer, q, q.spec, q.shape
        self.offset_rate, self.stretch_rate = offset_rate, stretch_rate * min(1.0, 2.0 ** (4 - q.spec.bits))
        scale = q.scales()
        self.grid = Grid.of(q, scale.zero)
        self.center = None if scale.center is None else scale.center.unsqueeze(-1)
        self.unit = scale.step.unsqueeze(-1)
        self.subs = Subs.of(scale, self.spec, q.scale.dtype) if self.spec.two_level else None
        self.stretches = not self.spec.inner and self.spec.layout.kind != "rank1"
        self.latent = self._start(layer.latent if layer.latent is not None else layer.original)
        self.offset = torch.zeros_like(self.latent)
        self.stretch = torch.zeros_like(self.unit)

    def _start(self, source: Tensor) -> Tensor:
        """Values [R, G, S] that round to the codes at hand, as near to `source` [N, K] as they can be."""
        coded = source.float() if self.given.places is None else without(source.float(), self.given.places)
        latent = group(coded, self.spec)
        latent = latent.contiguous() if self.center is None else latent - self.center
        number = self.grid.decode(group(self.given.codes, self.spec))
        everything = slice(None)
        place = self.grid.place(latent / self.unit, everything)
        wrong = place.round().clamp_(self.grid.low, self.grid.high) != number
        lowest = torch.where(number == self.grid.low, -torch.inf, number - INSIDE)
        highest = torch.where(number == self.grid.high, torch.inf, number + INSIDE)
        moved = self.grid.value(place.clamp(lowest, highest), everything) * self.unit
        return torch.where(wrong, moved, latent)

    def weight(self) -> Tensor:
        """W^ [N, K] in float32."""
        return self._dense([self._values(rows) for rows in self._parts()])

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
        """Let the layer be what the state stands for, as it would be written, for the next step too."""
        self.layer.replace(self.harden())
        self.layer.latent = self._ideal()

    def update(self, gradient: Tensor, offset_step: Tensor | float, stretch_step: Tensor | float) -> None:
        """Go against dL/dW^ `gradient` [N, K]: V by `offset_step`, t by `stretch_step`; the layer computes
        with the new W^ afterwards."""
        if self.given.places is not None:
            gradient = without(gradient, self.given.places)
        grouped = group(gradient, replace(self.spec, format="int8", center=False))  # padding counts nothing
        parts = []
        for rows in self._parts():
            self._descend(rows, grouped[rows].float(), offset_step, stretch_step)
            parts.append(self._values(rows).to(gradient.dtype))
        self.layer.compute_with(self._dense(parts))

    def _parts(self) -> Iterator[slice]:
        rows = self.latent.shape[0]
        size = rows if self.latent.is_cuda else max(1, CACHED * rows // self.latent.numel())
        return (slice(first, first + size) for first in range(0, rows, size))

    def _step(self, rows: slice) -> Tensor:
        """s(t) [r, G, 1]."""
        if self.subs is not None:
            return self.subs.step(self.stretch, rows)
        return self.unit[rows] * (1 + self.stretch[rows])

    def _descend(
        self, rows: slice, gradient: Tensor, offset_step: Tensor | float, stretch_step: Tensor | float
    ) -> None:
        low, high = self.grid.low, self.grid.high
        step, stretch, offset = self._step(rows), self.stretch[rows], self.offset[rows]
        ideal = self.latent[rows] / step
        place = self.grid.place(ideal, rows) + offset
        inside = (place >= low - 0.5) & (place <= high + 0.5)
        residual = self.grid.value(place.round_().clamp_(low, high), rows) - ideal * inside
        slope = (gradient * residual).sum(-1, keepdim=True) * self.unit[rows]
        offset.sub_((gradient * step).sign_().mul_(inside).mul_(offset_step))
        if self.stretches:
            stretch.sub_(slope.sign_().mul_(stretch_step)).clamp_(min=LEAST - 1)

    def _values(self, rows: slice) -> Tensor:
        """W^ of some rows, grouped [r, G, S]."""
        step = self._step(rows)
        number = self.grid.place(self.latent[rows] / step, rows).add(self.offset[rows]).round_()
        values = self.grid.value(number.clamp_(self.grid.low, self.grid.high), rows) * step
        return values if self.center is None else values + self.center[rows]

    def _dense(self, parts: list[Tensor]) -> Tensor:
        """Grouped rows -> [N, K], with the columns that were not quantized."""
        dense, q = ungroup(torch.cat(parts), self.shape, self.spec), self.given
        if q.kept is None or q.places is None:
            return dense
        return dense.index_copy(1, q.places.long(), q.kept.to(dense.dtype))

    def _ideal(self) -> Tensor:
        """What the state rounds, [N, K]."""
        everything = slice(None)
        step = self._step(everything)
        place = self.grid.place(self.latent / step, everything) + self.offset
        values = self.grid.value(place, everything) * step
        return self._dense([values if self.center is None else values + self.center])

    def harden(self) -> QTensor:
        """The quantization that the state stands for, scales as they are stored; the given one where nothing
        has moved."""
        if not bool(self.offset.any()) and not bool(self.stretch.any()):
            return self.given
        q, step = self.given, self._step(slice(None))
        scale, sub = q.scale, q.sub
        if self.subs is not None:
            scale, sub = self.subs.stored(self.stretch)
        elif self.stretches:
            found = store(step.squeeze(-1), self.spec, scale.dtype)
            step, scale = found.unsqueeze(-1), stored_scale(found, self.shape, self.spec).to(scale.dtype)
        number = self.grid.place(self.latent / step, slice(None)).add(self.offset).round_()
        codes = self.grid.encode(number.clamp_(self.grid.low, self.grid.high))
        codes = ungroup(codes, self.shape, self.spec).contiguous()
        return replace(q, codes=codes, scale=scale, sub=sub)

    def state(self) -> tuple[Tensor, ...]:
        """A copy of the state, for `restore`."""
        return self.offset.clone(), self.stretch.clone()

    def restore(self, state: tuple[Tensor, ...]) -> None:
        self.offset.copy_(state[0])
        self.stretch.copy_(state[1])
