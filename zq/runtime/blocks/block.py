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
    tensors, whose sum is the block's output, or one and None.

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
        cache = given.pop("past_key_values", None)
        layer_past = given.pop("layer_past", None)
        mask: Tensor | None = given.pop("attention_mask", None)
        call = Call(
            batch=x.shape[0],
            length=x.shape[1],
            mask=mask if mask is None or mask.numel() else None,  # an empty one: none
            cache=layer_past if cache is None else cache,
            tables=given.pop("position_embeddings", None),
            positions=given.pop("position_ids", None),
            alibi=given.pop("alibi", None),
            more=given,
        )
        y, addend = getattr(self, self.order)(x.reshape(-1, x.shape[-1]), call)
        step = self.attend.shared.step
        if addend is not None and (step is None or self.last):
            y = y + addend
        elif step is not None:
            step.addend = addend
        y = y.view(x.shape)
        return (y, None) if self.tuple_output else y

    def begin(self, x: Tensor) -> tuple[Rows, Tensor]:
        """(rows of the first norm, the input of the block), with what the block before has left."""
        step = self.attend.shared.step
        if step is None or step.addend is None:
            return self.norm_1(x), x
        addend, step.addend = step.addend, None
        return self.norm_1.after(addend, x)

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

    def post(self, x: Tensor, call: Call) -> tuple[Tensor, None]:
        assert self.norm_2 is not None
        h = self.norm_1.plain(x + self.mix(Rows(x), call, x.dtype))
        return self.norm_2.plain(h + self.feed(Rows(h), x.dtype)), None

    def normed(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        assert self.norm_2 is not None
        y = self.begin(x)[0].x
        z = self.norm_2.plain(y + self.mix(Rows(y), call, x.dtype))
        return z, self.feed(Rows(z), x.dtype)

    def mix(self, rows: Rows, call: Call, dtype: torch.dtype) -> Tensor:
        return self.out(Rows(self.attend(self.qkv(rows, dtype), call)), dtype)

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
