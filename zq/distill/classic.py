"""LKD as it was published (ZeroQuant, Yao et al. 2022, arXiv:2206.01861, section 4).

    L_k = MSE(block_k(X), quantized block_k(X)),   X = what the float blocks before block k produce

Every parameter of the block learns: linear weights through nearest rounding with the gradient passed
straight, norms and biases directly. Weight scales are the largest magnitude of each group at that moment,
activations are quantized per token. AdamW at rate 5e-6 without a schedule, 100 iterations of 32 windows, no
selection: what the last iteration leaves is written. No block's input depends on another block's result, so
blocks could be trained in any order or at once. `calibration: {source: random}` is the paper's setting
without data. `optimizer: {bits: 8}` keeps AdamW's states in 8 or 4 bits (zq/optim), `gradients: int8` makes
the gradients that pass the linear layers integer products (zq/distill/integer.py); both go together.

`lkd` (distill/lkd.py) is what grew out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zq.distill.integer import GRADIENTS, integer_gradients, precision_of
from zq.distill.lkd import shuffled
from zq.errors import ZqError
from zq.models.capture import run_block
from zq.numerics.qtensor import SCALES, QTensor, quantize
from zq.optim import AdamW
from zq.optim.config import states
from zq.quantizers.method import Block, Layer, Method, Needs, portions, quantized_inputs


@dataclass(frozen=True, kw_only=True)
class Options:
    iterations: int = field(default=100, metadata={"range": (0, 1 << 20)})
    batch: int = field(default=32, metadata={"range": (1, 1 << 20)})
    rate: float = field(default=5e-6, metadata={"range": (0.0, 1.0)})
    decay: float = field(default=0.01, metadata={"range": (0.0, 1.0)})
    scale: str = field(default="absmax", metadata={"allowed": tuple(SCALES)})
    gradients: str = field(default="float", metadata={"allowed": GRADIENTS})
    optimizer: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = self.optimizer
        if not isinstance(given, Mapping):
            raise ZqError(
                f"'optimizer' must be a mapping with bits or states, such as {{bits: 8}}, not {given!r}"
            )
        if unknown := sorted(map(str, set(given) - {"bits", "states"})):
            raise ZqError(f"'{unknown[0]}' of 'optimizer' is unknown; allowed: bits, states")
        states(given.get("bits", 32), given.get("states"), AdamW.names)


def run(block: Block, options: Options) -> None:
    """Train a copy of the block's parameters in float32, then round its weights once more and keep them."""
    learned = {layer.name: layer.weight.float() for layer in block.layers}
    if block.inputs:
        _train(block, learned, options)
    for layer in block.layers:
        layer.replace(_quantized(learned[layer.name], layer, options.scale, block.scale_dtype))


def _train(block: Block, learned: dict[str, Tensor], options: Options) -> None:
    """Fills `learned` with the new weights [N, K]; the other parameters change in the module."""
    module = block.module
    assert module is not None
    paths = {child: path for path, child in module.named_modules()}
    layers = {f"{paths[layer.module]}.weight": layer for layer in block.layers}
    held = {name: p.detach().float().clone().requires_grad_() for name, p in module.named_parameters()}
    rates: dict[str, Any] = {"lr": options.rate, "weight_decay": options.decay}
    optimizer = AdamW(held.values(), **rates, **options.optimizer)
    losses: list[Tensor] = []
    inputs, targets = torch.cat(block.teacher_inputs), torch.cat(block.targets)
    if options.iterations and not bool(torch.isfinite(targets).all()):
        raise ZqError(
            f"step lkd-classic cannot train '{block.name}': the activations of the float model are NaN or "
            f"Inf there; save the model in a dtype with more range than {inputs.dtype}, or use another step"
        )
    size, call = block.inputs[0].shape[0], block.calls[0]
    parts, precision = portions(options.batch, size, len(inputs)), precision_of(options.gradients)
    for batch in shuffled(len(inputs), parts * size, options.iterations, block.seed).to(inputs.device):
        optimizer.zero_grad()
        moved = {name: _rounding(held[name], layer, options.scale) for name, layer in layers.items()}
        total = torch.zeros((), device=inputs.device)
        for chosen in batch.split(size):
            with (
                torch.enable_grad(),
                quantized_inputs(block.layers, straight_through=True),
                integer_gradients(block.layers, precision),
            ):
                weights = {name: (p + moved.get(name, 0)).to(inputs.dtype) for name, p in held.items()}
                outputs = run_block(module, inputs[chosen], call, weights)
                loss = (outputs.float() - targets[chosen].float()).square().mean() / parts
            loss.backward()
            total += loss.detach()
        optimizer.step()
        losses.append(total)
    for name, p in module.named_parameters():
        value = held[name].detach()
        if name in layers:
            learned[layers[name].name] = value.T if layers[name].transposed else value
        elif not torch.equal(value.to(p.dtype), p):
            p.data.copy_(value)
            block.changed.add(f"{block.name}.{name}")
    if losses:
        ends = {"start": float(losses[0]), "end": float(losses[-1])}
        block.facts["training_loss"] = {**ends, "optimizer_bytes": optimizer.state_bytes}


def _quantized(weight: Tensor, layer: Layer, scale: str, dtype: torch.dtype) -> QTensor:
    """A weight [N, K] that training made of the layer's."""
    try:
        return quantize(weight, layer.scheme.weights, scale, dtype, places=layer.places)
    except ZqError as error:
        name = f"{layer.name}.weight"
        if bool(torch.isfinite(weight).all()) or not bool(torch.isfinite(layer.weight).all()):
            raise ZqError(f"'{name}': {error}") from None
        raise ZqError(
            f"'{name}': step lkd-classic trained it to NaN or Inf; give the step a smaller 'rate', or save "
            "the model in a dtype with more range, such as bfloat16"
        ) from None


def _rounding(weight: Tensor, layer: Layer, scale: str) -> Tensor:
    """What rounding to nearest adds to a weight as its module stores it; no gradient passes it."""
    dense = weight.detach().T if layer.transposed else weight.detach()
    rounded = _quantized(dense, layer, scale, torch.float32).dequantize()
    return (rounded.T if layer.transposed else rounded) - weight.detach()


def needs(options: Options) -> Needs:
    return Needs.INPUTS | Needs.FLOAT_INPUTS | Needs.PARAMETERS


METHOD = Method(
    name="lkd-classic", options=Options, needs=needs, run=run, batch=lambda options: options.batch
)
