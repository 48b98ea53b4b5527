"""Two levels of scales: an integer per group under one floating-point scale per channel (row).

    w = q * sub * channel        q * sub fits INT8, channel * sub is exact in the dtype of the scales

The first lets a kernel widen int4 codes to INT8 with integers only and sum a whole row in INT32 (QServe,
arXiv:2405.04532; LiquidGEMM, arXiv:2509.01229); the second makes channel * sub an ordinary group scale for
every other engine. bf16 has 8 significant bits: a channel scale of 5 of them leaves room for every even sub
and the odd ones up to 7 or more. So the two are chosen together, over all channel scales of 5 bits within
two octaves, for each of which every group takes the best sub that it allows:

    absmax   the least sum of squared steps that clips nothing
    mse      the least (weighted) squared error, estimated from the error of each group at 37 steps
             (zq/numerics/scales.py); a few channel scales, then all subs of the best, are tried on the values
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from zq.numerics.scales import CACHED, Scale, int_range, reach
from zq.spec import TensorSpec

SUB_MAX = 16
CHANNELS = 32  # candidates for the channel scale, 16 in an octave
LEAST = 4 / 7  # of the widest group's absmax step is what the smallest candidate reaches
FINALISTS = 4
TINY = torch.finfo(torch.float32).tiny
FACTORS = range(12, 49)  # fortieths of the absmax step

Cost = Callable[[Tensor, Any], Tensor]  # (channels [R, C, 1], sub: int or [R, C, G]) -> errors [R, C, G]


def sub_range(spec: TensorSpec) -> tuple[int, int]:
    """(least, most) integer group scale, 0 excluded: its product with every code of the spec fits INT8."""
    lowest = -int_range(spec)[0]
    return -min(SUB_MAX, 127 // lowest), min(SUB_MAX, 128 // lowest)


def levels(scales: Tensor, spec: TensorSpec) -> tuple[Tensor, Tensor] | None:
    """Group scales [N, G] -> (channel [N, 1] of the same dtype, sub [N, G] int8), or None.

    channel * sub are exactly the scales; the channel scale is the largest that divides all of its row, which
    is where the subs are smallest. None: some row has no such scale with subs in `sub_range`.
    """
    mantissa, exponent = torch.frexp(scales.float().abs())
    above = exponent - exponent.amin(1, keepdim=True)
    if not bool((torch.isfinite(scales) & (scales != 0)).all()) or int(above.max()) > SUB_MAX:
        return None
    whole = (mantissa * 2**24).long() << above
    common = reduce(torch.gcd, whole.unbind(1)).unsqueeze(1)
    sub = whole // common * torch.where(scales < 0, -1, 1)
    least, most = sub_range(spec)
    if int(sub.min()) < least or int(sub.max()) > most:
        return None
    channel = scales[:, :1].float() / sub[:, :1]
    return channel.to(scales.dtype), sub.to(torch.int8)


def absmax(x: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Scale:
    """x [R, G, S] float32 -> Scale with sub > 0 that clips nothing."""

    def choose(x: Tensor) -> Scale:
        wanted = (x.abs().amax(-1) / reach(spec)).unsqueeze(1)
        top = wanted.amax(-1, keepdim=True).clamp_min(TINY)

        def cost(channels: Tensor, sub: int) -> Tensor:
            step = channels * sub
            return torch.where(step >= wanted * (1 - 1e-3), (step / top).square(), torch.inf)

        return _best(_channels(wanted, spec, dtype), cost, _subs(spec, False), dtype)[0]

    return _by_rows(choose, x.shape[1] * max(x.shape[2], CHANNELS), x)


def mse(
    x: Tensor, spec: TensorSpec, dtype: torch.dtype, importance: Tensor | None = None, signed: bool = False
) -> Scale:
    """x [R, G, S] float32 -> the Scale with the least squared error per row; never worse than `absmax`.

    importance: broadcastable to x, weight of each squared error. signed: negative subs are tried too.
    """
    weights = torch.ones((), device=x.device) if importance is None else importance

    def choose(x: Tensor, weight: Tensor) -> Scale:
        return _search(x, weight, spec, dtype, signed)

    return _by_rows(choose, x.shape[1] * max(x.shape[2], CHANNELS), x, weights.expand_as(x))


def _by_rows(choose: Callable[..., Scale], values: int, *tensors: Tensor) -> Scale:
    """Rows do not depend on each other, so they are searched in portions that stay in a CPU's cache; `values`
    are in a row. Of all pairs with the same products, the one that `levels` finds is returned."""
    rows = max(1, (CACHED << 7 if tensors[0].is_cuda else CACHED) // values)
    found = [choose(*parts) for parts in zip(*(t.split(rows) for t in tensors), strict=True)]
    sub = torch.cat([scale.sub for scale in found if scale.sub is not None])
    return reduced(torch.cat([scale.scale for scale in found]), sub)


def reduced(channel: Tensor, sub: Tensor) -> Scale:
    """channel [R, 1], sub int32 [R, G] -> the pair with the same products whose subs are smallest."""
    common = reduce(torch.gcd, sub.abs().unbind(1)).unsqueeze(1)
    return Scale(channel * common, sub=sub // common)


def _search(x: Tensor, weight: Tensor, spec: TensorSpec, dtype: torch.dtype, signed: bool) -> Scale:
    from zq.numerics.qtensor import fake_groups  # rounding belongs there; it needs Scale from scales.py

    start = absmax(x, spec, dtype)
    unit = x.abs().amax(-1) / reach(spec)
    unit = torch.where(unit == 0, 1, unit).unsqueeze(1)
    x, weight = x.unsqueeze(1), weight.unsqueeze(1)  # [R, 1, G, S]; candidates take the second axis

    def error(step: Tensor) -> Tensor:
        return (fake_groups(x, spec, Scale(step)) - x).square_().mul_(weight).sum(-1)

    signs = (1, -1) if signed else (1,)
    tables = [torch.cat([error(unit * (sign * f / 40)) for f in FACTORS], 1) for sign in signs]

    def estimate(channels: Tensor, sub: int) -> Tensor:
        factor = channels * abs(sub) / unit
        place = (factor * 40).round().clamp(FACTORS[0], FACTORS[-1]).long() - FACTORS[0]
        beyond = (factor * (40 / FACTORS[-1])).clamp_min(1).square()
        return tables[sub < 0].gather(1, place) * beyond

    subs = _subs(spec, signed)
    channels = _channels(unit, spec, dtype)
    estimates, sub = _fit(channels, estimate, subs, dtype)
    place = estimates.sum(-1).topk(FINALISTS, dim=1, largest=False).indices
    sub = sub.gather(1, place.unsqueeze(-1).expand(-1, -1, sub.shape[-1]))
    trials = [sub, sub - 1, sub + 1, *([-sub] if signed else [])]
    trials = [torch.where((t < min(subs)) | (t > max(subs)) | (t == 0), sub, t) for t in trials]

    def exact(channels: Tensor, sub: Tensor | int) -> Tensor:
        return error(channels * sub)

    channel = _best(channels.gather(1, place), exact, trials, dtype)[0].scale
    found, total = _best(channel, exact, subs, dtype)
    better = total < error(start.step.unsqueeze(1)).sum(-1)
    assert found.sub is not None
    assert start.sub is not None
    return Scale(torch.where(better, found.scale, start.scale), sub=torch.where(better, found.sub, start.sub))


def _subs(spec: TensorSpec, signed: bool) -> list[int]:
    least, most = sub_range(spec)
    return [*range(1, most + 1), *(range(-1, least - 1, -1) if signed else ())]


def _channels(steps: Tensor, spec: TensorSpec, dtype: torch.dtype) -> Tensor:
    """Steps [R, 1, G] that groups would have alone -> candidates for the channel scale [R, C] float32, each
    of 5 significant bits and exact in `dtype`. For a row of zeros the first is 1."""
    info = torch.finfo(dtype)
    top, most = steps.amax(-1), sub_range(spec)[1]
    least = max(info.smallest_normal * info.eps, TINY)
    low = torch.where(top == 0, 1, (top * (LEAST / most)).clamp(least, info.max / (4 * most)))
    mantissa, exponent = torch.frexp(low)
    place = (mantissa * 32).floor().int() - 16 + torch.arange(CHANNELS, device=steps.device)
    channels = torch.ldexp((place % 16 + 16) / 32, exponent + place // 16)
    return channels.clamp_min(least).to(dtype).float()


def _fit(channels: Tensor, cost: Cost, subs: Sequence[Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """channels [R, C] -> (least error [R, C, G], its sub [R, C, G]) over subs whose product is exact."""
    channels = channels.unsqueeze(-1)
    error = sub = torch.zeros(())
    for i, s in enumerate(subs):
        step = channels * s
        exact = (step.to(dtype).float() == step) & torch.isfinite(step)
        now = torch.where(exact, cost(channels, s), torch.inf)
        if i == 0:
            error, sub = now, torch.zeros_like(now, dtype=torch.int32) + s
            continue
        better = now < error
        error, sub = torch.where(better, now, error), torch.where(better, s, sub)
    return error, sub


def _best(channels: Tensor, cost: Cost, subs: Sequence[Any], dtype: torch.dtype) -> tuple[Scale, Tensor]:
    """channels [R, C] -> (the Scale of the best in each row, its error [R, 1])."""
    error, sub = _fit(channels, cost, subs, dtype)
    total, place = error.sum(-1).min(1, keepdim=True)
    groups = place.unsqueeze(-1).expand(-1, -1, sub.shape[-1])
    return Scale(channels.gather(1, place), sub=sub.gather(1, groups)[:, 0]), total
