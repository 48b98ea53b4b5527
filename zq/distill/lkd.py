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
    window      2: the next block, rounded to nearest, learns along, and the error of both together counts
                (CBQ, arXiv:2312.07950, which keeps what it learned; here its own turn starts anew). Two
                blocks have gradients then
    norm_rate   of the gains of the norms, which are written as they are learned; 0 leaves them alone
    gradients   float, or the width of the integer products that give them (distill/integer.py)
    batch       windows per iteration; a multiple of the smallest that a step of the recipe asks for

Some windows are held out. The hard-rounded block is measured on them before the first iteration and at every
check, and the best state is kept: on held-out data the result is never worse than its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from zq.distill.gains import LearnedGain
from zq.distill.integer import GRADIENTS, integer_gradients, precision_of
from zq.distill.rounding import LearnedRounding
from zq.distill.student import Course
from zq.errors import ZqError
from zq.models.replay import recorded
from zq.numerics.qtensor import quantize
from zq.quantizers.method import Block, Layer, Method, Needs, portions


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
    gradients: str = field(default="float", metadata={"allowed": GRADIENTS})
    lookahead: int = field(default=1, metadata={"range": (0, 1 << 20)})
    window: int = field(default=1, metadata={"range": (1, 2)})
    holdout: float = field(default=0.0625, metadata={"range": (0.0, 1.0)})
    checks: int = field(default=4, metadata={"range": (1, 1 << 20)})


def run(block: Block, options: Options) -> None:
    """Learn the rounding of every layer of the block; what the steps before made of it is the start."""
    if not block.inputs:  # layers outside the blocks keep what the step before made of them
        return
    for layer in block.layers:
        if layer.quantized is None:
            raise ZqError(f"step lkd starts from a quantized '{layer.name}'; put gptq or rtn before it")
    if not block.layers:
        return
    training, held = _split(block, options)
    course = Course(block, options.loss, options.inputs, _ahead(options))
    with _beside(block, options) as beside:
        course.layers = [*block.layers, *beside]
        learned = _learned(block, beside, options)
        best, states = course.loss(held), [part.state() for part in learned]
        facts = block.facts["held_out_loss"] = {"start": best, "end": best}
        due = {-(-options.iterations * i // options.checks) for i in range(1, options.checks + 1)}
        for done in _descend(course, learned, training, options):
            if done not in due:
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


@contextmanager
def _beside(block: Block, options: Options) -> Iterator[list[Layer]]:
    """The layers of the next block that learn along, rounded to nearest; float again afterwards."""
    layers = block.following if options.window > 1 else []
    for layer in layers:
        layer.replace(quantize(layer.original, layer.scheme.weights, "mse", block.scale_dtype))
    yield layers
    for layer in layers:
        layer.compute_with(layer.original)


def _learned(block: Block, beside: list[Layer], options: Options) -> list[Learned]:
    """What is learned: the layers of a block and those `beside` it, and the gains of its norms when they
    have a rate."""
    rates = options.rounding_rate, options.scale_rate
    learned: list[Learned] = [LearnedRounding(layer, *rates) for layer in (*block.layers, *beside)]
    if options.norm_rate:
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
    parts = portions(options.batch, course.size, len(course.inputs))
    chosen = torch.zeros(parts, course.size, dtype=torch.long, device=device)
    fall = torch.zeros((), device=device)
    precision = precision_of(options.gradients)

    def gradients(windows: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad(), integer_gradients(course.layers, precision):
            return torch.autograd.grad(course.training_loss(windows) * 1000, parameters)

    def step() -> Tensor:
        found = gradients(chosen[0])
        for windows in chosen[1:]:
            found = [total + more for total, more in zip(found, gradients(windows), strict=True)]
        for part, gradient in zip(learned, found, strict=True):
            part.follow(gradient, fall)
        return fall

    for parameter in parameters:
        parameter.requires_grad_(True)
    play = recorded(step, device)
    batches = shuffled(training, chosen.numel(), options.iterations, course.block.seed).to(device)
    for done in range(options.iterations):
        chosen.copy_(batches[done].view_as(chosen))
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


def _ahead(options: Options) -> int:
    return max(options.lookahead, options.window - 1)


METHOD = Method(
    name="lkd",
    options=Options,
    needs=needs,
    run=run,
    batch=lambda options: options.batch,
    fewest=lambda options: options.batch + 1,
    ahead=_ahead,
)
