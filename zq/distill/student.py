"""What a block learns from."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from zq.distill.losses import divergence, token_weights, weighted_mse
from zq.models.capture import Call, run_block
from zq.models.replay import on_each
from zq.quantizers.method import Block, quantized_inputs

KL_TOKENS = 2048  # logits of more tokens at once would take gigabytes


class Course:
    """What a block learns from: inputs, where they should lead, and how the distance is measured.

    The distance is taken behind the block, or further on: the output runs through the float blocks of
    `block.ahead` first, at most `lookahead` of them, and at the end of the model becomes logits whose
    divergence counts. So errors that the rest of the model ignores cost nothing. `inputs` and `targets` are
    [S, T, D]. `layers` quantize their inputs: those of the block, and more when others learn along.
    """

    def __init__(self, block: Block, loss: str, inputs: str = "quantized", lookahead: int = 0) -> None:
        self.block, self.layers = block, block.layers
        self.ahead = block.ahead[:lookahead]
        self.logits = block.logits if lookahead > len(block.ahead) else None
        self.size = block.inputs[0].shape[0]
        self.inputs = torch.cat(block.inputs if inputs == "quantized" else block.teacher_inputs)
        self.targets = torch.cat(self._all_ahead())
        self.weights = token_weights(self.targets, loss)

    def distance(self, outputs: Tensor, chosen: Tensor | slice, index: int) -> Tensor:
        """Of the outputs [B, T, D] of the block for the windows `chosen`, with the calls of batch `index`."""
        reached = self._run_on(outputs, index)
        targets = self.targets[chosen]
        if self.logits is None:
            return weighted_mse(reached, targets, self.weights[chosen])
        # A decoder's tokens share one head, so an even selection of positions stands for all.
        step = max(1, -(-targets.shape[0] * targets.shape[1] // KL_TOKENS))
        with torch.no_grad():
            wanted = self.logits(targets[:, step // 2 :: step])
        return divergence(self.logits(reached[:, step // 2 :: step]), wanted)

    def training_loss(self, chosen: Tensor) -> Tensor:
        """Of a batch of windows `chosen` int64 [B], differentiable in the weights of the block."""
        assert self.block.module is not None
        with quantized_inputs(self.layers, straight_through=True):
            outputs = run_block(self.block.module, self.inputs[chosen], self.block.calls[0])
            return self.distance(outputs, chosen, 0)

    @torch.no_grad()
    def loss(self, batches: range) -> float:
        """Of the block as it would be written, on whole batches of windows."""
        total = 0.0
        assert self.block.module is not None
        for i in batches:
            first = i * self.size
            chosen = slice(first, first + self.block.inputs[i].shape[0])
            with quantized_inputs(self.layers):
                outputs = run_block(self.block.module, self.inputs[chosen], self.block.calls[i])
                total += float(self.distance(outputs, chosen, i))
        return total / len(batches) if math.isfinite(total) else math.inf  # so that what is finite is better

    def _all_ahead(self) -> list[Tensor]:
        """The targets as `_run_on` has them."""
        block = self.block
        if not self.ahead:
            return block.targets
        which = range(len(block.targets))
        calls = [[each[i] for _, each in self.ahead] for i in which]
        return list(on_each(self._run_on, block.targets, which, calls))

    def _run_on(self, hidden: Tensor, index: int) -> Tensor:
        """The output of the block, further on through the float blocks that it looks ahead to."""
        for module, calls in self.ahead:
            call: Call = calls[index]
            hidden = run_block(module, hidden, call)
        return hidden
