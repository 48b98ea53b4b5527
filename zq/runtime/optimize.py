"""zq.optimize: a model that is loaded, made fast in place."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from zq.errors import ZqError
from zq.kernels.table_kv import kv_units, text_unit
from zq.models.families import FAMILIES
from zq.models.layout import base_prefix, is_linear
from zq.models.structure import structure_of
from zq.runtime.blocks.around import Around
from zq.runtime.blocks.attention import Shared
from zq.runtime.blocks.block import FusedBlock
from zq.runtime.blocks.build import fuse, obstacle
from zq.runtime.cache import check_kv, heads_of
from zq.runtime.generation import attach
from zq.runtime.served import NAMES, capability
from zq.runtime.serving import ServedLinear, serve_linears

SHORT = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass
class Fused:
    """What `optimize` did to a model, for people: {what: how often}, in the order in which it was found.

    linears: by what computes them; fused: operators that replace several; left: what stayed as it was, and
    why. graphs: whether decode steps (encoders: calls) are captured in CUDA graphs.
    """

    linears: Counter[str] = field(default_factory=Counter)
    fused: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    graphs: bool = False

    def __str__(self) -> str:
        """One line for each kind."""
        lines = [
            f"{title}: " + ", ".join(f"{count} x {what}" for what, count in found.items())
            for title, found in (
                ("linears", self.linears),
                ("fused", self.fused),
                ("as they were", self.left),
            )
            if found
        ]
        return "\n".join([*lines, f"CUDA graphs: {'yes' if self.graphs else 'no'}"])


def optimize(model: Any, *, kv: str | None = None, report: bool = False) -> Any:
    """Make a model of `zq.load`, or of transformers' `from_pretrained`, fast where it is, and return it.

    Quantized linears are packed for the operators of their device, blocks run in fused operators, and on CUDA
    decode steps are captured (docs/runtime.md). Its weights cannot be saved afterwards. What was done is in
    `model.zq_fused`; with `report` the function returns (model, that). A model that is optimized already
    stays as it is, but for `kv`.

    kv: "int8" or "fp8": the caches that generate() makes for itself hold keys and values in 8 bits
    (docs/kv.md); None: as they are. Raises ZqError for a model that is spread over devices or has no
    parameters, and for a kv that it cannot have.
    """
    if kv is not None:
        check_kv(kv, model.config)
        heads_of(model.config, kv)
    if getattr(model, "zq_fused", None) is None:
        model.zq_fused = _optimize(model, kv)
    elif kv != model.zq_runner.kv:
        model.zq_runner.kv = kv
        load_attention(model, model.zq_runner.shared, _device(model), kv)
    return (model, model.zq_fused) if report else model


def _optimize(model: Any, kv: str | None) -> Fused:
    device = _device(model)
    found = Fused()
    arch = FAMILIES.get(model.config.model_type)
    structure = structure_of(model.config)
    shared = Shared()
    blocks: Any = [] if arch is None else model.get_submodule(base_prefix(model) + arch.blocks)
    for block in blocks:
        # One block after the other: what is merged is there twice for one block only.
        serve_block(model, block, device)
        _count(found.linears, block)
        if structure is None or arch is None:
            found.left["block of another structure"] += 1
            continue
        reason = obstacle(block, arch, structure)
        if reason:
            found.left[f"block: {reason}"] += 1
            continue
        fuse(block, arch, structure, model.config)
        block.attend.shared, block.attend.first = shared, shared.fused == 0
        shared.fused += 1
    if shared.fused == len(blocks):
        shared.config = model.config
        if blocks:
            _connect(model, arch, blocks, shared)
    for block in blocks:
        if isinstance(block, FusedBlock):
            _describe(found, block)
    for name, way in serve_linears(model, device).items():
        found.linears[f"{way} ({name})"] += 1
    _left_linears(found, model)
    found.graphs = attach(model, shared, list(blocks), encoder=arch is not None and arch.encoder, kv=kv)
    if device.type == "cuda":
        load_fused(model, device)
        load_attention(model, shared, device, kv)
    return found


def _connect(model: Any, arch: Any, blocks: Any, shared: Shared) -> None:
    """Let blocks, all of them fused, know of each other, and those of a decoder of what lies around them."""
    for block, following in pairwise(blocks):
        block.last = False
        if block.order == "post":
            block.norm_2.read_as(following.qkv.takes)
    if not arch.encoder:
        base = model.get_submodule(base_prefix(model).rstrip("."))
        shared.around = Around(base, arch, list(blocks), shared)


def serve_block(model: Any, block: nn.Module, device: torch.device) -> None:
    """Put served linears into one block."""
    inside = {id(module) for module in block.modules()}
    serve_linears(model, device, keep=lambda name: id(model.get_submodule(name)) not in inside)


def load_fused(model: nn.Module, device: torch.device) -> None:
    """So that the fused operators are not compiled or loaded in a CUDA graph. Raises ZqError."""
    from zq.kernels import cuda

    names = set()
    kind = NAMES.get(model.dtype, "")  # type: ignore[call-overload]
    for block in model.modules():
        if not isinstance(block, FusedBlock):
            continue
        parts = [block.norm_1, block.norm_2, block.activation]
        for part in parts:
            if part is None or part.takes is None or capability(device) is None:
                continue
            names |= {f"{op}_{SHORT[part.takes]}_{kind}" for op in part.units}
    cuda.prepare(device, sorted(names))


def load_attention(model: Any, shared: Shared, device: torch.device, kv: str | None) -> None:
    """The same for attention of prompts, and of steps over caches of 16 bits, and of `kv`. Raises ZqError."""
    if device.type == "cuda":
        from zq.kernels import cuda

        cuda.prepare(device, attention_units(model, shared, device, kv))


def attention_units(model: Any, shared: Shared, device: torch.device, kv: str | None) -> list[str]:
    """Names of the compile units that attention of a decoder needs on a CUDA device."""
    around: Any = shared.around
    if around is None or not around.fits(model.dtype, 1):
        return []
    kind = NAMES[model.dtype]
    names = [name for each in dict.fromkeys((None, kv)) for name in kv_units(kind, each)]
    blocks = model.zq_runner.blocks if around.takes_prompt(1) else []
    ways = {way for block in blocks for way in block.attend.gives(device, block.out.takes)[:1]}
    return [*names, *sorted(text_unit(kind, None if way is None else SHORT[way]) for way in ways)]


def _device(model: Any) -> torch.device:
    places = {parameter.device for parameter in model.parameters()}
    if len(places) != 1:
        held = ", ".join(sorted(map(str, places))) or "none"
        raise ZqError(
            f"zq.optimize needs a model on one device, and this one is on: {held}; load it without device_map"
        )
    return places.pop()


def _count(linears: Counter[str], block: nn.Module) -> None:
    linears.update(module.served.way for module in block.modules() if isinstance(module, ServedLinear))


def _describe(found: Fused, block: Any) -> None:
    for name, what in (("qkv", "q, k, v in one product"), ("up", "gate and up in one product")):
        found.fused[what] += getattr(block, name).merged
    norms = [norm for norm in (block.norm_1, block.norm_2) if norm is not None]
    read = block.qkv.takes is not None or block.up.takes is not None
    for norm in norms:
        found.fused["norm + quantization"] += norm.takes is not None
        if norm.takes is None and read:
            last = block.order == "post" and norm is block.norm_2 and block.last
            why = "nothing quantized reads it" if last else "its readers or its weights differ"
            found.left[f"norm: {why}"] += 1
    found.fused["activation + quantization"] += block.activation.takes is not None
    found.fused += Counter()  # drops what has not been found
    found.fused["block"] += 1
    if block.activation.takes is None and block.down.takes is not None:
        found.left[f"activation {type(block.activation.function).__name__}: no operator of it"] += 1


def _left_linears(found: Fused, model: nn.Module) -> None:
    found.left.update("linear: not quantized" for module in model.modules() if is_linear(module))
