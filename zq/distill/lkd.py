"""LKD: layer-by-layer knowledge distillation (ZeroQuant, arXiv:2206.01861, section 4), generalised.

The quantized block sees the hidden states that the quantized blocks before it produce, and learns to give
what the float block gives on the float model's hidden states, so it also repairs what came before it. What
it learns is how each weight is rounded and how large each scale is (distill/rounding.py); the inference graph
and the format stay the same. Signed gradient descent with a rate that falls linearly to zero: an offset can
move by at most rate / 2 steps of the grid in all.

Some windows are held out. The hard-rounded block is measured on them before the first step and at every
check, and the best state is kept: on held-out data the result is never worse than its start.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call

from zq.distill.losses import token_weights, weighted_mse
from zq.distill.rounding import LearnedRounding
from zq.errors import ZqError
from zq.models.capture import run_block
from zq.quantizers.method import Block, Method, Needs, quantized_inputs


@dataclass(frozen=True, kw_only=True)
class Options:
    iterations: int = 200
    rounding_rate: float = 1.0
    scale_rate: float = 0.2
    loss: str = field(default="normalised", metadata={"allowed": ("normalised", "mse")})
    holdout: float = 0.0625
    checks: int = 4


def run(block: Block, options: Options) -> None:
    """Learn the rounding of every integer layer of the block; what a step before made is the start."""
    if not block.inputs:  # layers outside the blocks keep what the step before made of them
        return
    for layer in block.layers:
        if layer.quantized is None:
            raise ZqError(f"step lkd starts from a quantized '{layer.name}'; put gptq or rtn before it")
    learned = [LearnedRounding(layer) for layer in block.layers if layer.scheme.weights.info.is_int]
    if not learned:
        return
    data = _Data(block, options)
    best, states = data.held_out_loss(), [state.state() for state in learned]
    facts = block.facts["held_out_loss"] = {"start": best, "end": best}
    generator = torch.Generator().manual_seed(block.seed)
    for step in range(options.iterations):
        parameters = [p for state in learned for p in state.parameters]
        with torch.enable_grad():
            loss = data.training_loss(learned, generator)
            gradients = torch.autograd.grad(loss * 1000, parameters)
        fall = (1 - step / options.iterations) / options.iterations
        with torch.no_grad():
            for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
                rate = options.scale_rate if i % 2 else options.rounding_rate
                parameter.sub_(gradient.sign_(), alpha=rate * fall)
        if (step + 1) % max(1, options.iterations // options.checks) == 0 or step + 1 == options.iterations:
            _apply(learned)
            now = data.held_out_loss()
            if now < best:
                best, states = now, [state.state() for state in learned]
    for state, values in zip(learned, states, strict=True):
        state.restore(values)
    _apply(learned)
    facts["end"] = best


def _apply(learned: list[LearnedRounding]) -> None:
    for state in learned:
        state.layer.replace(state.harden())


class _Data:
    """Training and held-out windows of a block, as single tensors [S, T, D]."""

    def __init__(self, block: Block, options: Options) -> None:
        self.block = block
        self.size = block.inputs[0].shape[0]
        self.inputs, self.targets = torch.cat(block.inputs), torch.cat(block.targets)
        self.weights = token_weights(self.targets, options.loss)
        count = len(block.inputs)
        if count < 2:
            raise ZqError(
                f"step lkd holds windows out and has only {len(self.inputs)}; give calibration more samples "
                f"than {self.size}"
            )
        held = min(count - 1, max(1, round(count * options.holdout)))
        self.held = range(count - held, count)
        self.training = sum(x.shape[0] for x in block.inputs[: count - held])

    def training_loss(self, learned: list[LearnedRounding], generator: torch.Generator) -> Tensor:
        """One batch of random windows through the block with differentiable weights."""
        chosen = torch.randperm(self.training, generator=generator)[: self.size].to(self.inputs.device)
        module, call = self.block.module, self.block.calls[0]
        assert module is not None
        names = {child: name for name, child in module.named_modules()}
        weights = {}
        for state in learned:
            dense = state.weight().to(state.layer.weight.dtype)
            dense = dense.T if state.layer.transposed else dense
            weights[f"{names[state.layer.module]}.weight"] = dense
        with quantized_inputs(self.block.layers, straight_through=True):
            outputs = functional_call(module, weights, (self.inputs[chosen], *call["args"]), call["kwargs"])
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return weighted_mse(outputs, self.targets[chosen], self.weights[chosen])

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The block as it would be written, on the held-out windows."""
        total = 0.0
        assert self.block.module is not None
        with quantized_inputs(self.block.layers):
            for i in self.held:
                first = sum(x.shape[0] for x in self.block.inputs[:i])
                part = slice(first, first + self.block.inputs[i].shape[0])
                outputs = run_block(self.block.module, self.inputs[part], self.block.calls[i])
                total += float(weighted_mse(outputs, self.targets[part], self.weights[part]))
        return total / len(self.held)


def needs(options: Options) -> Needs:
    return Needs.INPUTS


METHOD = Method(name="lkd", options=Options, needs=needs, run=run)
