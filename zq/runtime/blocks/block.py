"""A transformers block that runs in few operators, in the place and under the class of the original one."""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch
from torch import Tensor

from zq.runtime.blocks.attention import Attention, Call
from zq.runtime.blocks.site import Activation, Norm, Site
from zq.runtime.rows import Rows


class FusedBlock:
    """Goes in front of the class of a block. The orders are those of zq.models.structure; each returns two
    things: a tensor and what is to be added to it, or the output and its rows for the next block.

    last: of the blocks. In a step the others leave their sum to the norm of the next one.
    """

    parameters_of_class: tuple[str, ...]  # positional ones of the original forward
    order: str
    tuple_output: bool
    last: bool = True
    norm_1: Norm
    norm_2: Norm | None
    attend: Attention
    activation: Activation
    qkv: Site
    out: Site
    up: Site
    down: Site

    def forward(self, *args: Any, **given: Any) -> Any:
        given.update(zip(self.parameters_of_class, args, strict=False))
        x: Tensor = given.pop("hidden_states")
        caches = [given.pop(name, None) for name in ("cache", "past_key_values", "layer_past")]
        mask: Tensor | None = given.pop("attention_mask", None)
        call = Call(
            batch=x.shape[0],
            length=x.shape[1],
            mask=mask if mask is None or mask.numel() else None,  # an empty one: none
            cache=next((cache for cache in caches if cache is not None), None),
            tables=given.pop("position_embeddings", None),
            positions=given.pop("position_ids", None),
            alibi=given.pop("alibi", None),
            rows=self.handed(x),
            more=given,
        )
        y, left = getattr(self, self.order)(x.reshape(-1, x.shape[-1]), call)
        shared = self.attend.shared
        if isinstance(left, Rows):
            y = y.view(x.shape)
            ready = left.scale is not None and not self.last and not torch.compiler.is_compiling()
            shared.handed = (y, left) if ready else None
        elif shared.step is None or self.last:
            y = (y + left).view(x.shape)
        else:
            shared.step.addend = left
            y = y.view(x.shape)
        return (y, None) if self.tuple_output else y

    def handed(self, x: Tensor) -> Rows | None:
        """Rows that the block before has left, if x is what it has returned."""
        shared = self.attend.shared
        if shared.handed is None or torch.compiler.is_compiling():
            return None
        (y, rows), shared.handed = shared.handed, None
        return rows if y is x else None

    def addend(self) -> Tensor | None:
        """What the block before has left to be added to the hidden states."""
        step = self.attend.shared.step
        if step is None:
            return None
        addend, step.addend = step.addend, None
        return addend

    def begin(self, x: Tensor) -> tuple[Rows, Tensor]:
        """(rows of the first norm, the input of the block)"""
        addend = self.addend()
        return (self.norm_1(x), x) if addend is None else self.norm_1.after(addend, x)

    def serial(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        assert self.norm_2 is not None
        rows, x = self.begin(x)
        mixed = self.mix(rows, call, x.dtype)
        rows, h = self.norm_2.after(mixed, x)
        return h, self.feed(rows, x.dtype)

    def parallel(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        rows, x = self.begin(x)
        other = rows if self.norm_2 is None else self.norm_2(x)
        return x, self.mix(rows, call, x.dtype) + self.feed(other, x.dtype)

    def post(self, x: Tensor, call: Call) -> tuple[Tensor, Rows]:
        assert self.norm_2 is not None
        rows = Rows(x) if call.rows is None else call.rows
        rows, h = self.norm_1.both(self.mix(rows, call, x.dtype), x)
        rows, y = self.norm_2.both(self.feed(rows, x.dtype), h)
        return y, rows

    def normed(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        assert self.norm_2 is not None
        addend = self.addend()
        if addend is None:
            y = self.norm_1.plain(x)
            rows = Rows(y)
        else:
            rows, y = self.norm_1.both(addend, x)
        rows, z = self.norm_2.both(self.mix(rows, call, x.dtype), y)
        return z, self.feed(rows, x.dtype)

    def mix(self, rows: Rows, call: Call, dtype: torch.dtype) -> Tensor:
        return self.out(self.attend(self.qkv(rows, dtype), call, self.out.takes), dtype)

    def feed(self, rows: Rows, dtype: torch.dtype) -> Tensor:
        return self.down(self.activation(self.up(rows, dtype)), dtype)


_classes: dict[type, type] = {}


def fused_class(cls: type) -> type:
    """A subclass of a block's class, so that hooks of transformers, which ask for it, go on working."""
    if cls not in _classes:
        names = tuple(signature(cls.forward).parameters)[1:]  # type: ignore[attr-defined]
        facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "parameters_of_class": names}
        _classes[cls] = type(cls.__name__, (FusedBlock, cls), facts)
    return _classes[cls]
