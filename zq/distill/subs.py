"""Two-level scales that learn: the integer of a group moves, the scale of its channel stays.

    s(t) = c n(t),    n(t) = of the integers whose product with c can be stored, the nearest to n_0 (1 + t)

t is followed as if s(t) were s_0 (1 + t).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from zq.numerics.levels import reduced, sub_range
from zq.numerics.scales import Scale
from zq.spec import TensorSpec


@dataclass(frozen=True)
class Subs:
    """channel [R, 1], start n_0 [R, G]; table [R, V]: for each of the integers from `least` on, the nearest
    of its sign that can be stored. All float32; products are stored in `dtype`."""

    channel: Tensor
    start: Tensor
    table: Tensor
    least: int
    dtype: torch.dtype

    @classmethod
    def of(cls, scale: Scale, spec: TensorSpec, dtype: torch.dtype) -> Subs:
        """Of a two-level scale, with the channel scale halved as often as leaves all integers in range."""
        assert scale.sub is not None
        least, most = sub_range(spec)
        ends = torch.aminmax(scale.sub.float(), dim=1, keepdim=True)
        room = torch.minimum(
            torch.where(ends.max > 0, most / ends.max, torch.inf),
            torch.where(ends.min < 0, least / ends.min, torch.inf),
        )
        finer = torch.exp2(torch.log2(room).floor())
        channel = (scale.scale / finer).to(dtype).float()
        finer = torch.where(channel * finer == scale.scale, finer, 1)  # not where it would underflow
        channel = scale.scale / finer
        numbers = torch.arange(least, most + 1, dtype=torch.float32, device=channel.device)
        products = channel * numbers
        storable = (products.to(dtype).float() == products) & torch.isfinite(products) & (numbers != 0)

        def nearest(number: Tensor) -> Tensor:
            distance = (numbers - number).abs().masked_fill(numbers * number < 0, torch.inf)
            return numbers[distance.masked_fill(~storable, torch.inf).argmin(1)]

        table = torch.stack([nearest(number) for number in numbers], 1)
        return cls(channel, scale.sub * finer, table, least, dtype)

    def integers(self, stretch: Tensor, rows: slice) -> Tensor:
        """n(t) [r, G] float32 for all t [R, G, 1]."""
        start = self.start[rows]
        wanted = (start * (1 + stretch[rows].squeeze(-1))).round_()
        last = self.table.shape[1] - 1 + self.least
        wanted = torch.where(start > 0, wanted.clamp(1, last), wanted.clamp(self.least, -1))
        return self.table[rows].gather(1, (wanted - self.least).long())

    def step(self, stretch: Tensor, rows: slice) -> Tensor:
        """s(t) [r, G, 1] for all t [R, G, 1]."""
        return (self.channel[rows] * self.integers(stretch, rows)).unsqueeze(-1)

    def stored(self, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """Both levels for t [R, G, 1] as they are stored: (scale [R, 1], sub int8 [R, G])."""
        found = reduced(self.channel, self.integers(stretch, slice(None)).int())
        assert found.sub is not None
        return found.scale.to(self.dtype), found.sub.to(torch.int8)
