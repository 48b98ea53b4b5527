"""What a method is: options, what it needs to be given, and a function that works on one block.

The pipeline collects the union of all `needs`, provides it once, and calls `run` for every step in the
order of the recipe. A method sees one block and touches nothing else.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from zq.models.capture import Call, run_block
from zq.models.replay import on_each
from zq.models.skeleton import Skeleton
from zq.numerics.qtensor import QTensor, fake_quantize_tokens
from zq.quantizers.view import View
from zq.spec import Scheme, TensorSpec


class Needs(enum.Flag):
    """What the pipeline must provide to a step."""

    NOTHING = 0
    INPUTS = enum.auto()  # calibration tokens run through the block: hidden states before and after
    FLOAT_INPUTS = enum.auto()  # the float model's inputs to the block
    TEACHER = enum.auto()  # the block as it was, beside the one that changes, and its inputs
    PARAMETERS = enum.auto()  # to change any parameter of the block
    NORMS = enum.auto()  # to change the weights of the block's norms
    SPREADS = enum.auto()  # how widely the weights are spread that feed each input; before any step quantizes
    LINKS = enum.auto()  # the links along which a step may move scales; it runs before any quantizes
    ROUNDED = enum.auto()  # with LINKS: only of those links all of whose consumers quantize activations


TOKENS = Needs.INPUTS | Needs.FLOAT_INPUTS | Needs.TEACHER  # what calibration tokens are for


@dataclass
class Layer:
    """One linear layer that the recipe quantizes.

    module     nn.Linear, or transformers' Conv1D, whose weight is stored as [K, N] (`transposed`)
    folded     the weight [N, K] in float32 after scales were folded into it; what is quantized. The module
               computes with it in its own dtype. None before, and once the layer is quantized
    quantized  what a step made of the weight; None until then
    latent     the [N, K] values that rounded to the codes (GPTQ), for a step that learns the rounding
    places     int64 [M], input columns that stay in the dtype of the model (`keep=M` in the scheme), or None
    """

    name: str
    kind: str | None
    module: nn.Module
    transposed: bool
    scheme: Scheme
    folded: Tensor | None = None
    quantized: QTensor | None = None
    latent: Tensor | None = None
    places: Tensor | None = None
    _original: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K], whatever the module stores; float32 once scales were folded into it."""
        if self.folded is not None:
            return self.folded
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().T if self.transposed else weight.detach()

    @property
    def original(self) -> Tensor:
        """The float weight [N, K], folded scales included, as it was before the first `replace`."""
        return self.weight if self._original is None else self._original

    def replace(self, quantized: QTensor) -> None:
        """Keep the result and make the module compute with it, so that later steps see its error."""
        if self._original is None:
            self._original = self.weight.clone() if self.folded is None else self.folded
        self.quantized, self.folded = quantized, None
        self.compute_with(quantized.dequantize(self.weight.dtype))

    def fold(self, weight: Tensor) -> None:
        """Take over a float32 weight [N, K] that gives the block the same function, before quantization."""
        self.folded = weight
        self.compute_with(weight)

    def compute_with(self, dense: Tensor) -> None:
        """Let the module compute with a weight [N, K]; nothing else is kept of it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight.data.copy_(dense.T if self.transposed else dense)


@dataclass(frozen=True)
class BlockLink:
    """A link (zq/models/arch.py) of one block in memory, every consumer of which the recipe quantizes.

    name        full name of the producer; `layer` when the recipe quantizes that too, else None
    transposed  the producer is a linear that stores its weight as [K, N]
    channels    int64 [K], the producer's output channel that feeds each input channel of the consumers
    stored      the producer's parameters ("weight", "bias") and the dtype in which each is written
    """

    name: str
    producer: nn.Module
    layer: Layer | None
    is_norm: bool
    transposed: bool
    consumers: tuple[Layer, ...]
    channels: Tensor
    stored: dict[str, torch.dtype]

    @property
    def rounds(self) -> bool:
        """Whether every consumer quantizes its activations."""
        return all(layer.scheme.activations for layer in self.consumers)


@dataclass
class Block:
    """One transformer block (or the linear layers outside the blocks) while it is being quantized.

    sites    layers that read one input, in the order in which the block computes
    inputs   hidden states [B, T, D] that the quantized blocks before this one produce, per batch
    targets  what the float block makes of the float inputs; the same shapes
    ahead    the float blocks that follow, with their calls: as many as a step looks ahead
    following   the layers of the first of `ahead` that the recipe quantizes, for a step that learns both
    logits   from the output of the last block to logits, when a step looks ahead to the end of the model
    teacher  the block as it was, and (`teacher_inputs`) the float model's inputs to it: only when a step
             needs them
    links    along which scales may move, in the order of computation: only when a step needs them
    norms    paths of the norms in the module
    spreads  standard deviation [K] of the weights that feed each input of a site, or None, for every one of
             `sites`: only when a step needs them
    changed  full names of the parameters that a step changed, beside the weights of `layers`
    """

    name: str
    module: nn.Module | None
    layers: list[Layer]
    scale_dtype: torch.dtype
    seed: int
    sites: list[list[Layer]] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    ahead: list[tuple[nn.Module, list[Call]]] = field(default_factory=list)
    following: list[Layer] = field(default_factory=list)
    logits: Callable[[Tensor], Tensor] | None = None
    spreads: list[Tensor | None] = field(default_factory=list)
    teacher: nn.Module | None = None
    teacher_inputs: list[Tensor] = field(default_factory=list)
    links: list[BlockLink] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    changed: set[str] = field(default_factory=set)
    facts: dict[str, Any] = field(default_factory=dict)

    def generator(self, layer: Layer) -> torch.Generator:
        """Random numbers that depend on the seed and the layer only, never on what ran before."""
        generator = torch.Generator(device=layer.weight.device)
        generator.manual_seed(self._seed(layer.name))
        return generator

    @contextmanager
    def seeded(self, device: torch.device) -> Iterator[None]:
        """Inside, torch's own generators give numbers that depend on the seed and the block only; outside,
        they go on as if nothing had been drawn."""
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed(self.name))
            yield

    def _seed(self, name: str) -> int:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return int.from_bytes(digest[:7], "little")

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """The block as it is now on every batch."""
        return list(on_each(self.run, hidden, range(len(hidden)), self.calls))

    def run(self, hidden: Tensor, index: int) -> Tensor:
        """The block as it is now on one batch; activations quantized inside `quantized_inputs`."""
        assert self.module is not None
        return run_block(self.module, hidden, self.calls[index])

    def batches(self, windows: int) -> list[int]:
        """The first batches that have at most so many windows together, the first one in any case; 0: all."""
        sizes = [len(hidden) for hidden in self.inputs]
        sums = itertools.accumulate(sizes)
        return [i for i, total in enumerate(sums) if not windows or i == 0 or total <= windows]

    def second_moments(
        self, site: list[Layer], with_cross: bool = False, windows: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """X^T X [K, K] float32 of the site's input as its layers see it (quantized where they quantize
        it), and with `with_cross` (X_f - X)^T X, X_f the input in the float model. Sums over all tokens of
        `batches(windows)`.
        """
        first = site[0]
        k = first.weight.shape[1]
        hessian = torch.zeros(k, k, device=first.weight.device)
        cross = torch.zeros_like(hessian) if with_cross else None
        chosen = self.batches(windows)

        def site_input(hidden: Tensor, index: int) -> Tensor:
            with quantized_inputs(self.layers):
                return _site_input(first.module, lambda: self.run(hidden, index)).reshape(-1, k)

        def clean_input(hidden: Tensor, index: int) -> Tensor:
            assert self.teacher is not None
            teacher, same = self.teacher, twin(self.module, self.teacher, first.module)
            found = _site_input(same, lambda: run_block(teacher, hidden, self.calls[index]))
            return found.reshape(-1, k)

        seen = on_each(site_input, self.inputs, chosen, self.calls)
        clean = on_each(clean_input, self.teacher_inputs, chosen, self.calls) if with_cross else repeat(None)
        for x, wanted in zip(seen, clean, strict=False):
            _add_gram(hessian, x)
            if cross is not None and wanted is not None:
                x = x.float()
                cross.addmm_((wanted.float() - x).T, x)
        return hessian, cross


def portions(batch: int, size: int, windows: int) -> int:
    """How many batches of `size` windows, which is what runs through a block at once, make up the `batch`
    that a step asks for; no more than there are `windows`."""
    return max(1, min(batch, windows) // size)


class _StraightThrough(torch.autograd.Function):
    """`fake_quantize_tokens` whose gradient passes as if nothing were rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spec: TensorSpec) -> Tensor:
        return fake_quantize_tokens(x, spec)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return *grads, None


@contextmanager
def quantized_inputs(layers: list[Layer], straight_through: bool = False) -> Iterator[None]:
    """Inside, the layers quantize their input as their scheme says; with `straight_through` gradients pass
    the rounding as if it were not there."""

    rounded = _StraightThrough.apply if straight_through else fake_quantize_tokens

    def hook_for(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]] | None:
        spec = layer.scheme.activations
        return spec and (lambda module, args: (rounded(args[0], spec), *args[1:]))

    hooks = [
        layer.module.register_forward_pre_hook(hook)
        for layer in layers
        if (hook := hook_for(layer)) is not None
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_gram(total: Tensor, x: Tensor) -> None:
    """total [K, K] float32 += x^T x of x [T, K]. On a GPU products of 16-bit values are exact and summed in
    float32, so they need not be widened first."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16):
        total.add_(torch.mm(x.T, x, out_dtype=torch.float32))
    else:
        x = x.float()
        total.addmm_(x.T, x)


class _Seen(Exception):
    """Ends a forward pass once the input that was wanted has been seen."""


def _site_input(layer: nn.Module, run: Callable[[], Tensor]) -> Tensor:
    """The input of `layer` when `run` reaches it; the rest of the pass is not computed."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Seen

    hook = layer.register_forward_pre_hook(stop)
    try:
        run()
    except _Seen:
        pass
    finally:
        hook.remove()
    return seen[0]


def twin(block: nn.Module | None, teacher: nn.Module, layer: nn.Module) -> nn.Module:
    """The module of the teacher at the place of `layer` in the block."""
    assert block is not None
    name = next(name for name, module in block.named_modules() if module is layer)
    return teacher.get_submodule(name)


@dataclass(frozen=True)
class Method:
    """`options` is a frozen dataclass with defaults; `needs(options)` and `run(block, options)` say and do
    what the method is about; `batch(options)` is the number of windows that it wants to work on at once,
    `fewest(options)` how many windows it cannot do without, `ahead(options)` how many blocks it wants to see
    behind this one (a decoder's head counts as one);
    `stores(scheme, shape, options)` is the scheme of an [N, K] layer with what the method adds to what is
    stored, and raises ZqError when the layer cannot have it.

    A method that changes the whole model first has `view(skeleton, view, options, seed)`, which gives
    the view that every later step sees.
    """

    name: str
    options: type
    needs: Callable[[Any], Needs]
    run: Callable[[Block, Any], None]
    batch: Callable[[Any], int | None] = lambda options: None
    fewest: Callable[[Any], int] = lambda options: 0
    ahead: Callable[[Any], int] = lambda options: 0
    view: Callable[[Skeleton, View, Any, int], View] | None = None
    stores: Callable[[Scheme, tuple[int, int], Any], Scheme] = lambda scheme, shape, options: scheme
