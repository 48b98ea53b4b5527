"""LKD: layer-by-layer knowledge distillation (ZeroQuant, arXiv:2206.01861, section 4), generalised.

The quantized block sees the hidden states that the quantized blocks before it produce, and learns to give
what the float block gives on the float model's hidden states, so it also repairs what came before it. What
it learns is how each weight is rounded and how large each scale is (distill/rounding.py); the inference graph
and the format stay the same. Signed gradient descent with a rate that falls linearly to zero: an offset can
move by at most rate / 2 steps of the grid in all. It keeps no optimizer states, so there is none to
store in fewer bits; those of distill/classic.py can be.

    inputs      quantized: what the quantized blocks before it produce; float: what the float ones do
    loss        normalised: each token counts by its relative error; mse: by its absolute one
    lookahead   blocks of the float model that the error passes through before it is measured; what passes
                the last block becomes logits, and their divergence is measured
    norm_rate   of the gains of the norms, which are written as they are learned; 0 leaves them alone
    gradients   float, or the width of the integer products that give them (distill/integer.py)
    batch       windows per iteration

Some windows are held out. The hard-rounded block is measured on them before the first iteration and at every
check, and the best state is kept: on held-out data the result is never worse than its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zq.distill.gains import LearnedGain
from zq.distill.integer import Precision, integer_gradients
from zq.distill.rounding import LearnedRounding, learnable
from zq.distill.student import Course
from zq.errors import ZqError
from zq.models.replay import recorded
from zq.quantizers.method import Block, Method, Needs


class Learned(Protocol):
    """Something of a block that learns: LearnedRounding, LearnedGain."""

    @property
    def parameter(self) -> Tensor: ...
    def follow(self, gradient: Tensor, fall: Tensor) -> None: ...
    def soften(self) -> None: ...
    def settle(self) -> None: ...
    def state(self) -> tuple[Tensor, ...]: ...
    def restore(self, state: tuple[Tensor, ...]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Options:
    iterations: int = field(default=400, metadata={"range": (0, 1 << 20)})
    batch: int = field(default=8, metadata={"range": (1, 1 << 20)})
    rounding_rate: float = field(default=1.0, metadata={"range": (0.0, 100.0)})
    scale_rate: float = field(default=0.2, metadata={"range": (0.0, 2.0)})
    norm_rate: float = field(default=0.0, metadata={"range": (0.0, 2.0)})
    inputs: str = field(default="quantized", metadata={"allowed": ("quantized", "float")})
    loss: str = field(default="normalised", metadata={"allowed": ("normalised", "mse")})
    gradients: str = field(default="float", metadata={"allowed": ("float", "int8", "int6", "int4")})
    lookahead: int = field(default=1, metadata={"range": (0, 1 << 20)})
    holdout: float = field(default=0.0625, metadata={"range": (0.0, 1.0)})
    checks: int = field(default=4, metadata={"range": (1, 1 << 20)})


def run(block: Block, options: Options) -> None:
    """Learn the rounding of every integer layer of the block; what a step before made is the start."""
    if not block.inputs:  # layers outside the blocks keep what the step before made of them
        return
    for layer in block.layers:
        if layer.quantized is None:
            raise ZqError(f"step lkd starts from a quantized '{layer.name}'; put gptq or rtn before it")
    learned = _learned(block, options)
    if not learned:
        return
    training, held = _split(block, options)
    course = Course(block, options.loss, options.inputs)
    best, states = course.loss(held), [part.state() for part in learned]
    facts = block.facts["held_out_loss"] = {"start": best, "end": best}
    for done in _descend(course, learned, training, options):
        if done * options.checks // options.iterations == (done - 1) * options.checks // options.iterations:
            continue
        for part in learned:
            part.settle()
        now = course.loss(held)
        if now < best:
            best, states = now, [part.state() for part in learned]
        for part in learned:
            part.soften()
    for part, values in zip(learned, states, strict=True):
        part.restore(values)
        part.settle()
    facts["end"] = best


def _learned(block: Block, options: Options) -> list[Learned]:
    """What is learned of a block: its integer layers, and the gains of its norms when they have a rate."""
    layers = [layer for layer in block.layers if learnable(layer.scheme.weights)]
    rates = options.rounding_rate, options.scale_rate
    learned: list[Learned] = [LearnedRounding(layer, *rates) for layer in layers]
    if learned and options.norm_rate:
        assert block.module is not None
        for path in block.norms:
            learned.append(LearnedGain(block.module.get_submodule(path), options.norm_rate))
            block.changed.add(f"{block.name}.{path}.weight")
    return learned


def _split(block: Block, options: Options) -> tuple[int, range]:
    """(windows to train on, batches held out: the last ones)."""
    count = len(block.inputs)
    if count < 2:
        raise ZqError(
            f"step lkd holds windows out and has only {block.inputs[0].shape[0]}; give calibration more "
            f"samples than {options.batch}, or the step a smaller batch"
        )
    held = min(count - 1, max(1, round(count * options.holdout)))
    return sum(x.shape[0] for x in block.inputs[: count - held]), range(count - held, count)


def _descend(course: Course, learned: list[Learned], training: int, options: Options) -> Iterator[int]:
    """Signed gradient descent over random batches; yields the number of iterations done, after each."""
    device = course.inputs.device
    parameters = [part.parameter for part in learned]
    chosen = torch.zeros(course.size, dtype=torch.long, device=device)
    fall = torch.zeros((), device=device)

    precision = None if options.gradients == "float" else Precision(int(options.gradients[3:]))

    def step() -> Tensor:
        with torch.enable_grad(), integer_gradients(course.block.layers, precision):
            loss = course.training_loss(chosen)
            gradients = torch.autograd.grad(loss * 1000, parameters)
        for part, gradient in zip(learned, gradients, strict=True):
            part.follow(gradient, fall)
        return loss

    for parameter in parameters:
        parameter.requires_grad_(True)
    play = recorded(step, device)
    batches = shuffled(training, course.size, options.iterations, course.block.seed).to(device)
    for done in range(options.iterations):
        chosen.copy_(batches[done])
        fall.fill_((1 - done / options.iterations) / options.iterations)
        play()
        yield done + 1
    for parameter in parameters:
        parameter.requires_grad_(False)


def shuffled(windows: int, size: int, count: int, seed: int) -> Tensor:
    """int64 [count, size]: every window once in a random order, then once more, and so on."""
    generator = torch.Generator().manual_seed(seed)
    rounds = max(1, -(-count * size // windows))
    order = torch.cat([torch.randperm(windows, generator=generator) for _ in range(rounds)])
    return order[: count * size].view(count, size)


def needs(options: Options) -> Needs:
    wanted = Needs.INPUTS
    if options.inputs == "float":
        wanted |= Needs.FLOAT_INPUTS
    return wanted | Needs.NORMS if options.norm_rate else wanted


METHOD = Method(
    name="lkd",
    options=Options,
    needs=needs,
    run=run,
    batch=lambda options: options.batch,
    fewest=lambda options: options.batch + 1,
    ahead=lambda options: options.lookahead,
)
