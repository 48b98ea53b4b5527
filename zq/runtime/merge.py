"""Products with the same input made one, and rows of a weight put in another order. Both are exact: every
output keeps its codes and scales."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zq.kernels import layout
from zq.runtime.cpu import IntegerLinear, PackedLinear
from zq.runtime.served import DenseLinear, KernelLinear
from zq.runtime.serving import ServedLinear


def mergeable(linears: Sequence[nn.Module]) -> bool:
    """Whether these differ in nothing but their rows."""
    if not all(isinstance(linear, ServedLinear) for linear in linears):
        return False
    return len({_kind(linear.served) for linear in linears}) == 1  # type: ignore[arg-type]


def merged(linears: Sequence[ServedLinear]) -> ServedLinear:
    """One linear with the rows of all, in their order. They must be `mergeable`."""
    if len(linears) == 1:
        return linears[0]
    parts: list[Any] = [linear.served for linear in linears]
    made = copy.copy(parts[0])
    made._buffers = dict(made._buffers)
    if isinstance(made, KernelLinear):
        made.n = sum(part.n for part in parts)
        made.w = _packed(parts)
        made.ws = None if made.ws is None else torch.cat([part.ws for part in parts])
    else:
        for name, value in made._buffers.items():
            made._buffers[name] = None if value is None else torch.cat([getattr(p, name) for p in parts])
        _repack(made)
    return ServedLinear(made, _biases(linears), sum(x.out_features for x in linears), linears[0].in_features)


def reorderable(linear: nn.Module) -> bool:
    """Whether each output has scales of its own, or none."""
    served = linear.served if isinstance(linear, ServedLinear) else None
    return not (isinstance(served, KernelLinear) and served.op == "fp8_block128")


def reordered(linear: nn.Module, order: Tensor) -> nn.Module:
    """A linear whose output i is output order[i] of `linear`, which is `reorderable`. order: int64 [N]."""
    if not isinstance(linear, ServedLinear):
        return _reordered_plain(linear, order)
    made: Any = copy.copy(linear.served)
    made._buffers = dict(made._buffers)
    if isinstance(made, KernelLinear):
        parts = [None if x is None else x[order.to(x.device)] for x in _unpacked(made)]
        made.w = layout.pack(made.packing, *parts)  # type: ignore[arg-type]
        made.ws = None if made.ws is None else made.ws[order.to(made.ws.device)]
    else:
        for name, value in made._buffers.items():
            made._buffers[name] = None if value is None else value[order.to(value.device)]
        _repack(made)
    bias = None if linear.bias is None else linear.bias[order.to(linear.bias.device)]
    return ServedLinear(made, bias, linear.out_features, linear.in_features)


def _reordered_plain(linear: Any, order: Tensor) -> nn.Linear:
    """nn.Linear or Conv1D -> nn.Linear."""
    rows = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T
    made = nn.Linear(rows.shape[1], rows.shape[0], bias=linear.bias is not None, device="meta")
    order = order.to(rows.device)
    made.weight = nn.Parameter(rows[order].contiguous(), requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach()[order], requires_grad=False)
    return made


def _kind(served: Any) -> tuple[Any, ...]:
    if isinstance(served, KernelLinear):
        cut = served.op == "fp8_block128" and served.n % layout.PAD  # a tile of scales would cross layers
        return (KernelLinear, served.op, served.k, served.packing, served.ws is None, cut and id(served))
    if isinstance(served, IntegerLinear):
        return (IntegerLinear, served.codes.shape[1], served.zero is None)
    if isinstance(served, PackedLinear):
        return (PackedLinear, served.codes.shape[1], served.group, served.quantize)
    assert isinstance(served, DenseLinear)
    return (DenseLinear, served.activations, served.weight.shape[1])


def _repack(made: Any) -> None:
    if isinstance(made, PackedLinear):
        made.pack()


def _packed(parts: Sequence[KernelLinear]) -> Tensor:
    """Rows of 128 follow each other in a packed weight, so whole ones are simply joined."""
    if all(part.n % layout.PAD == 0 for part in parts[:-1]):
        return torch.cat([part.w for part in parts])
    columns = zip(*(_unpacked(part) for part in parts), strict=True)
    joined = [None if column[0] is None else torch.cat(column) for column in columns]  # type: ignore[arg-type]
    return layout.pack(parts[0].packing, *joined)  # type: ignore[arg-type]


def _unpacked(part: KernelLinear) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return layout.unpack(part.packing, part.w, part.n, part.k)


def _biases(linears: Sequence[ServedLinear]) -> Tensor | None:
    given = [linear.bias for linear in linears if linear.bias is not None]
    if not given:
        return None
    return torch.cat(
        [given[0].new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in linears]
    )
