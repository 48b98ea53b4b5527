"""Record what transformers passes to each block, by running the model's own forward once per batch.

No block computes anything during capture: each is replaced by a recorder that hands its input on,
so the cost is one embedding lookup, whatever the depth. What differs between blocks (the sliding
and full masks of Qwen2) is recorded because transformers itself chooses it. The recorder stands in
for the block's `forward` only, so that attributes that the model reads on a block stay there.

With hidden[b] and calls[i][b] the forward of the whole model is
    for i: hidden[b] = run_block(block i, hidden[b], calls[i][b])
bit for bit, which `tests/models/test_capture.py` shows for every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from zq.errors import ZqError
from zq.models.arch import gives_tuple
from zq.models.find import position_limit
from zq.models.skeleton import Skeleton

Call = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Captured:
    """hidden: per batch, the first block's input [B, T, D].

    calls: calls[i][b] = {"args": tuple, "kwargs": dict}, what block i gets beside the hidden
    states for batch b. Equal tensors (masks, rotary tables) are one object throughout.
    """

    hidden: list[torch.Tensor]
    calls: list[list[Call]]


class _LastBlockReached(Exception):
    """Ends the forward before the tail, which need not be loaded."""


@torch.no_grad()
def capture_inputs(skeleton: Skeleton, batches: Sequence[torch.Tensor]) -> Captured:
    """Inputs of the first block and call arguments of every block.

    Args:
        skeleton: with its outside loaded (`load_outside`); blocks and tail may be on meta.
        batches: int64 token ids [B, T], every one without padding.

    Raises ZqError when T exceeds the positions that the model has a table for, or an id exceeds
    the vocabulary.
    """
    for ids in batches:
        _check_ids(skeleton, ids)
    record = _Recorder(skeleton.n_blocks, gives_tuple(skeleton.arch, skeleton.block(0)))
    with record.installed([skeleton.block(i) for i in range(skeleton.n_blocks)]):
        for ids in batches:
            try:
                skeleton.model.base_model(input_ids=ids.to(skeleton.device), use_cache=False)
            except _LastBlockReached:
                continue
    return Captured(hidden=record.hidden, calls=record.calls)


def run_block(
    block: nn.Module, hidden: torch.Tensor, call: Call, weights: dict[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Output [B, T, D] of one block for input `hidden` [B, T, D] and its recorded call; computed with
    `weights`, by their names in the block, in the place of its own."""
    args, kwargs = (hidden, *call["args"]), call["kwargs"]
    out = functional_call(block, weights, args, kwargs) if weights else block(*args, **kwargs)
    return out[0] if isinstance(out, tuple) else out


def last_hidden(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """The model's last hidden state from the last block's output: the tail's norm and projection.

    Needs `load_tail` when the family has a tail. [B, T, D] -> [B, T, D'] (D' = D but for OPT-350m).
    """
    base = skeleton.model.base_model
    for path in skeleton.arch.tail:
        parent, _, leaf = path.rpartition(".")
        module = getattr(base.get_submodule(parent), leaf)
        if module is not None:  # switched off by the config (OPT-350m's norm)
            hidden = module(hidden)
    return hidden


def has_head(skeleton: Skeleton) -> bool:
    """Whether the model has a language-model head, so that `head` gives logits."""
    return skeleton.model.get_output_embeddings() is not None


def head(skeleton: Skeleton, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, vocab] from the last block's output [B, T, D]; needs `load_tail`.

    Raises ZqError when the model has no language-model head.
    """
    model = skeleton.model
    output = model.get_output_embeddings()
    if output is None:
        raise ZqError(
            f"{type(model).__name__} has no language-model head, so there are no logits; "
            "compare last hidden states instead"
        )
    # The head is the whole top-level module around the output embedding: BERT's has a transform.
    whole = next(m for m in model.children() if any(part is output for part in m.modules()))
    return whole(last_hidden(skeleton, hidden))


@dataclass
class _Recorder:
    n_blocks: int
    tuple_output: bool
    hidden: list[torch.Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    _seen: dict[tuple, list[torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.calls = [[] for _ in range(self.n_blocks)]

    @contextmanager
    def installed(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Shadow every block's `forward`, and take the shadows away again whatever happens."""
        try:
            for i, block in enumerate(blocks):
                block.forward = self._forward(i)  # type: ignore[method-assign]
            yield
        finally:
            for block in blocks:
                block.__dict__.pop("forward", None)

    def _forward(self, i: int) -> Callable[..., Any]:
        def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if i == 0:
                self.hidden.append(hidden_states)
            self.calls[i].append({"args": self._share(args), "kwargs": self._share(kwargs)})
            if i == self.n_blocks - 1:
                raise _LastBlockReached
            return (hidden_states, None) if self.tuple_output else hidden_states

        return forward

    def _share(self, value: Any) -> Any:
        """The same value with each tensor replaced by the first equal one seen."""
        if isinstance(value, torch.Tensor):
            return self._share_tensor(value)
        if isinstance(value, (tuple, list)):
            return type(value)(self._share(v) for v in value)
        if isinstance(value, dict):
            return {k: self._share(v) for k, v in value.items()}
        return value

    def _share_tensor(self, value: torch.Tensor) -> torch.Tensor:
        # The stride is part of the key: a kernel may round differently for another layout.
        known = self._seen.setdefault((value.shape, value.stride(), value.dtype, value.device), [])
        for other in known:
            if other is value or torch.equal(other, value):
                return other
        known.append(value)
        return value


def positions(skeleton: Skeleton) -> int | None:
    """The longest sequence that the model has positions for; None with alibi (BLOOM)."""
    return position_limit(skeleton.config, skeleton.arch)


def _check_ids(skeleton: Skeleton, ids: torch.Tensor) -> None:
    config = skeleton.config
    if ids.ndim != 2 or ids.numel() == 0:
        raise ZqError(f"token ids have shape {list(ids.shape)}; give a non-empty [batch, length]")
    limit = positions(skeleton)
    if limit is not None and ids.shape[-1] > limit:
        raise ZqError(
            f"sequence length {ids.shape[-1]} exceeds the model's {limit} positions "
            "(max_position_embeddings in config.json); use shorter sequences"
        )
    vocabulary = config.vocab_size
    if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ZqError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())} but the model's vocabulary "
            f"has {vocabulary} entries; use the tokenizer of this model"
        )
