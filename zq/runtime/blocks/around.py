"""What lies around the blocks of a model in a decode step: rotary tables, ALiBi, the last norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zq.models.arch import Arch
from zq.runtime.blocks.attention import Attention, Shared
from zq.runtime.step import Buffers, Step

# Types of rotary embeddings whose angles depend on the position and on nothing else.
FIXED = ("default", "linear", "llama3", "yarn")


class Rotary:
    """Goes in front of the class of transformers' rotary embedding: a step reads a table."""

    zq_shared: Shared

    def forward(self, x: Tensor, position_ids: Tensor, *more: Any, **given: Any) -> Any:
        step = self.zq_shared.step
        turn = step.turn() if isinstance(step, Step) and step.own else None
        if turn is None:
            return super().forward(x, position_ids, *more, **given)  # type: ignore[misc]
        return turn[0].unsqueeze(1), turn[1].unsqueeze(1)


class Biased:
    """Goes in front of BLOOM's class: zq's own attention knows the slopes."""

    zq_shared: Shared

    def build_alibi_tensor(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Any:
        step = self.zq_shared.step
        if step is not None and step.own:
            return None
        return super().build_alibi_tensor(attention_mask, num_heads, dtype)  # type: ignore[misc]


class OneNorm:
    """Goes in front of the class of an RMSNorm that no operator quantizes: one kernel instead of eight."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, tuple(self.weight.shape), self.weight, self.variance_epsilon)


class Around:
    """A decoder whose blocks are all fused.

    rope: as in zq.models.structure. attends: the attention of each block. rotary: transformers' rotary
    embedding, if there is one. biased: BLOOM's base model, else None.
    """

    def __init__(self, base: Any, arch: Arch, blocks: list[Any], shared: Shared) -> None:
        self.attends: list[Attention] = [block.attend for block in blocks]
        self.rope = self.attends[0].rope
        self.rotary = getattr(base, "rotary_emb", None)
        self._fits: dict[tuple[torch.dtype, int], bool] = {}  # each step asks
        self.biased = base if hasattr(base, "build_alibi_tensor") else None
        for module, front in ((self.rotary, Rotary), (self.biased, Biased)):
            if module is not None:
                module.zq_shared = shared
                _put_in_front(module, front)
        for path in arch.tail:
            norm = _find(base, path)
            if hasattr(norm, "variance_epsilon"):
                _put_in_front(norm, OneNorm)

    def fits(self, dtype: torch.dtype, length: int) -> bool:
        """Whether steps over `length` positions use zq's own attention."""
        key = dtype, length
        if key not in self._fits:
            self._fits[key] = all(attend.fits(dtype, length) for attend in self.attends)
        return self._fits[key]

    def takes_prompt(self, length: int) -> bool:
        """Whether a prompt of `length` tokens can be read as zq/runtime/prompt.py does."""
        windows = [attend.window for attend in self.attends]
        return self.biased is None and all(each is None or each >= length for each in windows)

    @torch.inference_mode(False)  # else steps outside of it could not use them
    @torch.no_grad()
    def buffers(self, batch: int, length: int, dtype: torch.dtype, device: torch.device) -> Buffers:
        """What a step with zq's own attention reads, with its tables."""
        made = Buffers(batch, length, device, own=True)
        made.turns = self._turns(length, dtype, device)
        made.slopes = self._slopes(device)
        return made

    def _turns(self, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """Cosine and sine of the positions 0 .. length - 1 [2, P, R]; None where they are no fixed function
        of the position, or are not needed."""
        if self.rope == "pairs":  # GPT-J keeps [sin | cos] of every position
            source = self.attends[0].module if self.rotary is None else self.rotary  # the model's since 5.24
            table = source.embed_positions.to(device, dtype)
            low, high = table.repeat_interleave(2, -1).chunk(2, -1)
            return torch.stack((high, low))
        if self.rotary is None or self.rotary.rope_type not in FIXED:
            return None
        like = torch.empty(0, dtype=dtype, device=device)
        places = torch.arange(length, device=device)[None]
        return torch.stack([x[0].to(dtype) for x in self.rotary(like, places)])

    def _slopes(self, device: torch.device) -> Tensor | None:
        """ALiBi's, float32 [H]: what the bias grows by from one position to the next."""
        if self.biased is None:
            return None
        two = torch.ones(1, 2, dtype=torch.int64, device=device)
        bias = self.biased.build_alibi_tensor(two, self.attends[0].queries, torch.float32)
        return bias[:, 0, 1].contiguous()


def _put_in_front(module: Any, front: type) -> None:
    cls = type(module)
    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    module.__class__ = type(cls.__name__, (front, cls), facts)


def _find(base: Any, path: str) -> Any:
    for name in path.split("."):
        base = getattr(base, name, None)
    return base
