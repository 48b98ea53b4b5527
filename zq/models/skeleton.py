"""A transformers model of which only the parts in use hold weights.

    skeleton = build_skeleton(config, arch, shapes, torch.bfloat16)
    skeleton.load_outside(read)           # embeddings: enough to produce the first block's input
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, read)      # one block in memory
        ...
        skeleton.unload_block(i)
    skeleton.load_tail(read)              # final norm and head

Tensors come through `read(keys) -> {key: tensor}`, so this module knows no file format. Every
parameter belongs to exactly one zone: a block, "outside" (what feeds the blocks) or "tail" (what
reads them). A tied parameter (lm_head.weight) has no checkpoint key of its own: it takes the tensor
of its source. Where the checkpoint stores two that differ, they are two parameters, each with its key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from zq.errors import ZqError
from zq.models import names
from zq.models.arch import Arch
from zq.models.build import Device, drop, empty_model, get, put, shapes_only, stores_pooler
from zq.models.find import model_class, one_line
from zq.models.layout import (
    LinearInfo,
    Same,
    base_prefix,
    is_linear,
    linear_info,
    linear_shapes,
    settle_ties,
    uncovered,
    zones,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Read = Callable[[Iterable[str]], dict[str, torch.Tensor]]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(kw_only=True)
class Skeleton:
    """See the module docstring; made by `build_skeleton`.

    config: the transformers config the model was built from, unchanged.
    param_keys: full name -> checkpoint key, for every parameter that is not tied and for every
        persistent buffer that the checkpoint stores.
    tied: name of a tied parameter -> name of the parameter whose tensor it shares.
    missing: parameters without a checkpoint key (empty when built with strict=True).
    extra: checkpoint keys that the model does not use.
    omitted: linears that the class builds by default and this model does not, because the checkpoint
        has no tensors for them (the pooler of an encoder).
    """

    model: PreTrainedModel
    arch: Arch
    config: PretrainedConfig
    dtype: torch.dtype
    device: Device
    param_keys: dict[str, str]
    tied: dict[str, str]
    missing: tuple[str, ...]
    extra: list[str]
    omitted: list[str]
    _zones: dict[int | str, list[str]] = field(repr=False)

    @property
    def base_prefix(self) -> str:
        """Full name of the base model with a trailing dot; "" when it is the model itself."""
        return base_prefix(self.model)

    @property
    def n_blocks(self) -> int:
        return len(self._blocks())

    def _blocks(self) -> nn.ModuleList:
        return self.model.get_submodule(self.base_prefix + self.arch.blocks)  # type: ignore

    def block(self, i: int) -> nn.Module:
        """Block i; on meta unless it is loaded."""
        return self._blocks()[i]

    def block_prefix(self, i: int) -> str:
        """Full name of block i, for example "model.layers.3"."""
        return f"{self.base_prefix}{self.arch.blocks}.{i}"

    def linears(self, i: int) -> list[LinearInfo]:
        """The linears of block i in the order of the description's sites."""
        block, prefix = self.block(i), self.block_prefix(i)
        return [
            linear_info(block.get_submodule(path), f"{prefix}.{path}", site.name, site.kind)
            for site in self.arch.sites
            for path in site.linears
        ]

    def norms(self, i: int) -> list[str]:
        """Paths of the norms in block i that have a weight."""
        there = {name for name, _ in self.block(i).named_parameters()}
        return [path for path in self.arch.norms if f"{path}.weight" in there]

    def other_linears(self) -> list[str]:
        """Full names of the linears outside the blocks: lm_head, pooler.dense, project_in, ..."""
        inside = f"{self.base_prefix}{self.arch.blocks}."
        return [
            name
            for name, module in self.model.named_modules()
            if is_linear(module) and not name.startswith(inside)
        ]

    def zone(self, where: int | str) -> list[str]:
        """Parameter names of block i, of "outside" or of "tail"; tied ones included."""
        return list(self._zones[where])

    def key_of(self, name: str) -> str:
        """The checkpoint key of a parameter; a tied one has its source's."""
        return self.param_keys[self.tied.get(name, name)]

    def check(self, shapes: Shapes) -> list[str]:
        """Every problem between this model and a checkpoint's shapes, one line each; [] if none."""
        problems = [f"{name}: missing from the checkpoint" for name in self.missing]
        for name, key in self.param_keys.items():
            stored, wanted = shapes.get(key), tuple(get(self.model, name).shape)
            if stored is None:
                problems.append(f"{key}: missing from the checkpoint")
            elif tuple(stored) != wanted:
                problems.append(
                    f"{key}: the checkpoint has shape {list(stored)}, config.json asks for {list(wanted)}"
                )
        return problems

    def load_block(self, i: int, read: Read) -> None:
        """Fill block i, cast to `dtype`, on `device`."""
        self._load(i, read)

    def unload_block(self, i: int) -> None:
        """Put block i back on meta; its memory is free once the caller holds no tensor of it."""
        self._unload(i)

    def load_outside(self, read: Read) -> None:
        """Fill what the blocks' inputs need: embeddings, their norm and projection."""
        self._load("outside", read)

    def unload_outside(self) -> None:
        """Put it back on meta."""
        self._unload("outside")

    def load_tail(self, read: Read) -> None:
        """Fill what reads the last block: final norm, output projection, pooler, head."""
        self._load("tail", read)

    def unload_tail(self) -> None:
        """Put it back on meta."""
        self._unload("tail")

    def _load(self, where: int | str, read: Read) -> None:
        wanted: dict[str, str] = {}
        for name in self._zones[where]:
            source = self.tied.get(name)
            if source is not None and get(self.model, source).device.type != "meta":
                put(self.model, name, get(self.model, source))
            else:
                wanted[name] = self.key_of(name)
        tensors = read(list(dict.fromkeys(wanted.values())))
        for name, key in wanted.items():
            held, tensor = get(self.model, name), tensors[key]
            if tensor.shape != held.shape:
                raise ZqError(
                    f"{key}: the checkpoint holds shape {list(tensor.shape)}, config.json asks for "
                    f"{list(held.shape)}; correct config.json or download the tensor again"
                )
            dtype = self.dtype if held.is_floating_point() else held.dtype
            put(self.model, name, tensor.to(device=self.device, dtype=dtype))

    def _unload(self, where: int | str) -> None:
        for name in self._zones[where]:
            drop(self.model, name)


def build_skeleton(
    config: PretrainedConfig,
    arch: Arch,
    shapes: Shapes,
    dtype: torch.dtype,
    *,
    device: Device = "cpu",
    where: str = "checkpoint",
    strict: bool = True,
    same: Same = lambda a, b: False,
) -> Skeleton:
    """Build the model on meta and bind its parameters to the checkpoint's keys.

    Args:
        shapes: checkpoint key -> shape, from the headers.
        dtype: dtype that loaded weights are cast to.
        where: how to name the checkpoint in an error.
        strict: raise for missing tensors and wrong shapes; else leave them to `check`.
        same: whether the tensors under two keys are equal; asked where the config ties two parameters
            that are both stored.

    Raises ZqError when a linear inside a block is in no site or in several, and (strict) one that
    lists missing tensors and shapes that disagree with the config.
    """
    pooler = stores_pooler(arch, shapes)
    cls = model_class(config)
    try:
        model = empty_model(cls, config, dtype=dtype, device=device, pooler=pooler)
    except Exception as error:  # a config that contradicts itself: heads that do not divide, ...
        raise ZqError(
            f"{where}: transformers cannot build {cls.__name__} from this config "
            f"({one_line(error)}); correct config.json"
        ) from error
    every = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    parameters = set(every)
    bound = names.match(every, shapes, model.base_model_prefix)
    found, tied = settle_ties(bound.found, model.all_tied_weights_keys, same)
    missing = tuple(n for n in bound.missing if n not in tied and n not in found)
    # A persistent buffer has its value already; the checkpoint's is taken where there is one.
    buffers = [name for name in model.state_dict() if name not in parameters]
    stored = names.match(buffers, shapes, model.base_model_prefix).found
    found.update(stored)
    skeleton = Skeleton(
        model=model,
        arch=arch,
        config=config,
        dtype=dtype,
        device=device,
        param_keys=found,
        tied=tied,
        missing=missing,
        extra=names.extra(found, shapes),
        omitted=[]
        if pooler
        else sorted(linear_shapes(shapes_only(config, where)).keys() - linear_shapes(model)),
        _zones=zones(model, arch, [*every, *stored]),
    )
    wrong = {path for i in range(skeleton.n_blocks) for path in uncovered(arch, skeleton.block(i))}
    if wrong:
        raise ZqError(
            f"{where}: family description incomplete: with this config a {arch.model_type} block "
            f"differs from what zq knows at {', '.join(sorted(wrong))}; use a model without these"
        )
    problems = skeleton.check(shapes) if strict else []
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ZqError(
            f"{where}: {len(problems)} tensors do not fit {type(model).__name__}: "
            f"{'; '.join(problems[:5])}{more}; complete the download or correct config.json"
        )
    return skeleton


def refuse_lost_blocks(skeleton: Skeleton, where: str) -> None:
    """A checkpoint with more blocks than its config would lose them without a word: raises ZqError."""
    numbered = re.compile(rf"(?:^|\.){re.escape(skeleton.arch.blocks)}\.(\d+)\.")
    for key in skeleton.extra:
        found = numbered.search(key)
        if found and int(found[1]) >= skeleton.n_blocks:
            raise ZqError(
                f"{where}: the config has {skeleton.n_blocks} blocks, but the checkpoint also holds '{key}'; "
                "correct the number of layers in config.json"
            )
