"""The plan: what will happen to every tensor, checked completely before any work.

    plan = make_plan(folder, recipe)     raises one ZqError that lists everything wrong
    plan.layers                          every linear layer, its scheme or why it stays
    plan.shards                          every byte of the output, by file, in order

Only headers are read, so a plan of a 70B model takes seconds and no memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from zq.calibration import planned_windows, writable
from zq.checkpoint.index import CheckpointIndex, TensorInfo, main_dtype, read_index
from zq.checkpoint.reader import reader, same_tensor
from zq.checkpoint.writer import Shard, Slot, plan_shards
from zq.errors import ZqError
from zq.export import EXPORTERS, asked_as
from zq.kernels.select import missed
from zq.methods import resolve_all
from zq.models.find import find_arch, load_config
from zq.models.layout import is_transposed, linear_shape
from zq.models.sampling import CACHE_BYTES
from zq.models.skeleton import Skeleton, build_skeleton, refuse_lost_blocks
from zq.quantizers.links import at_work, may_change, without_scale
from zq.quantizers.method import Method
from zq.quantizers.view import View
from zq.recipe import Recipe
from zq.rules import auto_group, check_rules
from zq.spec import Scheme

BATCH = 8  # windows
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True, kw_only=True)
class PlannedLayer:
    """One linear layer. `unit` is the block index, "outside" or "tail"; kind None: not in a block."""

    name: str
    unit: int | str
    kind: str | None
    shape: tuple[int, int]
    transposed: bool
    scheme: Scheme | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    folder: Path
    recipe: Recipe
    index: CheckpointIndex
    view: View
    skeleton: Skeleton
    dtype: torch.dtype
    format: str
    layers: list[PlannedLayer]
    steps: list[tuple[Method, Any]]
    units: dict[int | str, list[Slot]]
    shards: list[Shard]
    windows: Tensor | None  # of text, [samples, length]; [0, length] when the model writes all
    notes: list[str] = field(default_factory=list)
    shard_bytes: int = SHARD_BYTES
    written: Tensor | None = None  # windows that the model wrote before; None: it writes when it is wanted
    sensitivity: dict[str, Any] | None = None  # what the widths were chosen by (zq/autobits.py)

    @property
    def exporter(self) -> ModuleType:
        return EXPORTERS[self.format]

    @property
    def assigned(self) -> dict[str, Scheme]:
        return {layer.name: layer.scheme for layer in self.layers if layer.scheme}

    @property
    def quantization_config(self) -> dict[str, Any]:
        # Also what the class builds and this checkpoint lacks: "Linear" would match it.
        skipped = [*(layer.name for layer in self.layers if not layer.scheme), *self.skeleton.omitted]
        return self.exporter.config(self.assigned, skipped)

    @cached_property
    def may_change(self) -> dict[str, str]:
        """Tensors beside quantized weights that a step may change -> the names of the steps."""
        return may_change(self.skeleton, self.assigned, self.steps)

    def layer_slots(self, layer: PlannedLayer) -> list[Slot]:
        """The output tensors of a quantized layer's weight."""
        assert layer.scheme is not None
        return self.exporter.slots(layer.name, layer.scheme, layer.shape, self.dtype)

    def source(self, name: str) -> TensorInfo:
        """The entry of a parameter of the model in the checkpoint, as the steps see that."""
        return self.view.index.tensors[self.skeleton.param_keys[name]]

    def rows(self) -> list[dict[str, Any]]:
        """One row per tensor of the source: what it becomes, why, and the bytes that it will take."""
        layers = {f"{layer.name}.weight": layer for layer in self.layers}
        rows = []
        for unit in self.units:
            for name in self.skeleton.zone(unit):
                if name in self.skeleton.tied:
                    continue
                info, layer = self.source(name), layers.get(name)
                becomes, nbytes = info.dtype, info.nbytes
                if layer and layer.scheme:
                    becomes, nbytes = str(layer.scheme), sum(s.nbytes for s in self.layer_slots(layer))
                why = layer.why if layer else "not a linear layer"
                why += f"; {self.view.becomes[name]}" if name in self.view.becomes else ""
                why += f", changed by {self.may_change[name]}" if name in self.may_change else ""
                shape = list(info.shape)
                rows.append({"name": name, "shape": shape, "becomes": becomes, "why": why, "bytes": nbytes})
        return rows

    @property
    def bytes_before(self) -> int:
        """Of every tensor in the checkpoint, whether the model uses it or not."""
        return self.index.nbytes

    @property
    def bytes_after(self) -> int:
        return sum(slot.nbytes for shard in self.shards for slot in shard.slots)

    @property
    def bits_per_weight(self) -> float:
        """Bits written per quantized weight: codes, scales and whatever else the format needs."""
        quantized = [layer for layer in self.layers if layer.scheme]
        written = sum(slot.nbytes for layer in quantized for slot in self.layer_slots(layer))
        return 8 * written / sum(math.prod(layer.shape) for layer in quantized)

    @property
    def stream_bytes(self) -> int:
        """Bytes of one stream of hidden states of all calibration tokens."""
        if self.windows is None:
            return 0
        return self.tokens * self.skeleton.config.hidden_size * self.dtype.itemsize

    @property
    def tokens(self) -> int:
        """How many calibration tokens run through the blocks, written ones included."""
        if self.windows is None:
            return 0
        return self.samples * self.windows.shape[1]

    @property
    def samples(self) -> int:
        """How many calibration windows there are, written ones included."""
        return 0 if self.windows is None else len(self.windows) + self.recipe.calibration.generated

    @property
    def batch(self) -> int:
        """Windows that run through a block at once: what the steps ask for."""
        asked = [method.batch(options) for method, options in self.steps]
        return min((size for size in asked if size), default=BATCH)

    @property
    def memory_estimate(self) -> int:
        """Bytes: torch and transformers themselves; the largest unit twice (as it was, as it becomes); the
        largest quantized layer in float32, as input, target and result of the search for its scales; with
        folded scales, the weights of a block in float32; four streams of hidden states (float and quantized,
        before and after a block); what the view takes. Or the whole model and
        a cache, where it writes its own text first."""
        sizes = [sum(slot.nbytes for slot in slots) for slots in self.units.values()]
        for unit in self.units:
            names = [name for name in self.skeleton.zone(unit) if name in self.skeleton.param_keys]
            sizes.append(sum(self.source(name).nbytes for name in names))
        layer = max((math.prod(x.shape) for x in self.layers if x.scheme), default=0)
        writing = self.bytes_before + CACHE_BYTES["cpu"] if self.recipe.calibration.generated else 0
        folded = 4 * max(sizes) // self.dtype.itemsize if self.may_change else 0
        streams = 4 * self.stream_bytes
        units = 2 * max(sizes) + 3 * 4 * layer + folded + streams
        return 500_000_000 + max(units, writing) + self.view.memory


def make_plan(folder: Path, recipe: Recipe, *, shard_bytes: int = SHARD_BYTES, device: str = "cpu") -> Plan:
    """Raises ZqError when the checkpoint, the recipe and the format do not fit together."""
    where = str(folder / "config.json")
    steps = resolve_all(recipe)
    config = load_config(folder)
    arch = find_arch(config, where)
    index = read_index(folder)
    dtype = main_dtype(index)
    same = partial(same_tensor, index)
    build = partial(build_skeleton, arch=arch, dtype=dtype, device=device, where=str(folder), same=same)
    skeleton = build(config, shapes=index.shapes)
    view = View(config=config, index=index, read=reader(index))
    for method, options in steps:
        if method.view:
            view = method.view(skeleton, view, options, recipe.seed)
            skeleton = build(view.config, shapes=view.index.shapes)
    notes = list(view.notes)
    for target, source in skeleton.model.all_tied_weights_keys.items():
        if target not in skeleton.tied:
            notes.append(
                f"config.json ties {target} to {source}, but they are stored and differ: both are kept"
            )
    layers, recipe = _assign(skeleton, writable(recipe, skeleton, notes), notes)
    layers = [_with_stored(layer, steps, recipe) for layer in layers]
    if recipe.format != "auto":
        layers = _adapted(layers, recipe.format, notes)
    steps = at_work(steps, [layer.scheme for layer in layers if layer.scheme])
    notes += without_scale(skeleton, {layer.name for layer in layers if layer.scheme}, steps)
    format_name = _choose_format(recipe, layers, dtype, notes)
    notes += missed({layer.scheme for layer in layers if layer.scheme})
    _check_dtypes(skeleton, view.index, layers)
    refuse_lost_blocks(skeleton, where)
    if skeleton.extra:
        count, cls = len(skeleton.extra), type(skeleton.model).__name__
        notes.append(f"{count} tensors that {cls} does not use are left out, first {skeleton.extra[0]}")
    units = _units(skeleton, view.index, layers, EXPORTERS[format_name], dtype)
    shards = plan_shards([slot for slots in units.values() for slot in slots], shard_bytes)
    return Plan(
        folder=folder,
        recipe=recipe,
        index=index,
        view=view,
        skeleton=skeleton,
        dtype=dtype,
        format=format_name,
        layers=layers,
        steps=steps,
        units=units,
        shards=shards,
        windows=planned_windows(folder, skeleton, recipe, steps, notes),
        notes=notes,
        shard_bytes=shard_bytes,
    )


def _check_dtypes(skeleton: Skeleton, index: CheckpointIndex, layers: list[PlannedLayer]) -> None:
    bad = []
    for layer in layers:
        info = index.tensors[skeleton.key_of(f"{layer.name}.weight")]
        if layer.scheme and info.dtype not in ("BF16", "F16", "F32"):
            bad.append(f"{info.name} is {info.dtype}")
    if bad:
        raise ZqError(
            f"{index.root}: {bad[0]} ({len(bad)} such tensors); zq quantizes BF16, F16 and F32 weights; "
            "start from the original floating-point checkpoint"
        )


def _assign(skeleton: Skeleton, recipe: Recipe, notes: list[str]) -> tuple[list[PlannedLayer], Recipe]:
    """Give every linear layer its scheme by the first rule that matches, automatic groups resolved."""
    found: list[tuple[str, int | str, str | None, tuple[int, int], bool]] = []
    for i in range(skeleton.n_blocks):
        for info in skeleton.linears(i):
            found.append((info.name, i, info.kind, (info.n, info.k), info.transposed))
    tail = set(skeleton.zone("tail"))
    for name in skeleton.other_linears():
        module = skeleton.model.get_submodule(name)
        unit = "tail" if f"{name}.weight" in tail else "outside"
        found.append((name, unit, None, linear_shape(module), is_transposed(module)))

    rules = [recipe.rule_for(name, kind) for name, _, kind, _, _ in found]
    check_rules(recipe, [(name, kind) for name, _, kind, _, _ in found], rules, notes)
    size = auto_group(rules, [shape for _, _, _, shape, _ in found], notes)
    # As config.json declares them: engines tie what it says even where both tensors are stored.
    declared = skeleton.model.all_tied_weights_keys
    ties = {source: target for target, source in declared.items()} | declared
    layers = []
    for (name, unit, kind, shape, transposed), rule in zip(found, rules, strict=True):
        scheme = rule.scheme and rule.scheme.with_group(size) if rule else None
        why = (
            (rule.why or f"rule '{rule.match}'")
            if rule
            else ("no rule names it" if kind is None else "no rule matches")
        )
        shared = ties.get(f"{name}.weight")
        if scheme and shared:
            spot = (rule and rule.where) or recipe.where
            raise ZqError(
                f"{spot}: '{name}' shares its weight with {shared} and stays as it is; drop the rule that "
                "names it"
            )
        if not scheme and f"{name}.weight" in skeleton.tied:
            why = f"tied to {skeleton.tied[name + '.weight']}"
        layers.append(
            PlannedLayer(
                name=name,
                unit=unit,
                kind=kind,
                shape=shape,
                transposed=transposed,
                scheme=scheme,
                why=("skipped by " if rule and not scheme else "") + why,
            )
        )
    if not any(layer.scheme for layer in layers):
        raise ZqError(f"{recipe.where} quantizes nothing: every rule skips; see `zq recipes show w4a8`")
    fixed = tuple(replace(r, scheme=r.scheme and r.scheme.with_group(size)) for r in recipe.rules)
    return layers, replace(recipe, rules=fixed)


def _with_stored(layer: PlannedLayer, steps: list[tuple[Method, Any]], recipe: Recipe) -> PlannedLayer:
    """The layer's scheme with whatever the steps store beside the codes."""
    scheme = layer.scheme
    for (method, options), step in zip(steps, recipe.steps, strict=True):
        try:
            scheme = scheme and method.stores(scheme, layer.shape, options)
        except ZqError as error:
            raise ZqError(f"{step.where or recipe.where}: '{layer.name}': {error}") from None
    return replace(layer, scheme=scheme)


def _adapted(layers: list[PlannedLayer], format: str, notes: list[str]) -> list[PlannedLayer]:
    """The layers with schemes as the format stores them."""
    adapt = EXPORTERS[format].adapt
    changed = [replace(layer, scheme=layer.scheme and adapt(layer.scheme)) for layer in layers]
    new = {
        f"{old.scheme} becomes {now.scheme}" for old, now in zip(layers, changed, strict=True) if old != now
    }
    notes += [f"format {format}: {text}" for text in sorted(new)]
    return changed


def _choose_format(recipe: Recipe, layers: list[PlannedLayer], dtype: torch.dtype, notes: list[str]) -> str:
    """compressed-tensors wherever it can hold every layer, else zq's own; said in the notes."""
    if recipe.format == "zq":
        return "zq"
    _refuse_ragged(layers)
    wanted = "compressed-tensors" if recipe.format == "auto" else recipe.format
    exporter = EXPORTERS[wanted]
    for layer in layers:
        reason = layer.scheme and exporter.refuse(layer.scheme, layer.shape, layer.transposed, dtype)
        if reason and recipe.format != "auto":
            raise ZqError(
                f"{wanted} cannot hold '{layer.name}' as {layer.scheme}: {reason}; use {asked_as('zq')}"
            )
        if reason:
            notes.append(f"zq's own format (loads with `import zq`): {layer.name}: {reason}")
            return "zq"
    assigned = {layer.name: layer.scheme for layer in layers if layer.scheme}
    reason = exporter.refuse_all(assigned, [layer.name for layer in layers if not layer.scheme])
    if reason:
        raise ZqError(f"{recipe.where}: {reason}; change the rules or use {asked_as('compressed-tensors')}")
    asymmetric = any(not scheme.weights.symmetric for scheme in assigned.values())
    if asymmetric and wanted == "compressed-tensors":
        notes.append(
            "asymmetric weights: vLLM and zq.load read them, but transformers with compressed-tensors 0.20 "
            "only with quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    return wanted


def _refuse_ragged(layers: list[PlannedLayer]) -> None:
    quantized = [(layer, layer.scheme.weights.layout) for layer in layers if layer.scheme]
    for layer, layout in quantized:
        k = layer.shape[1]
        if layout.kind != "group" or k % (layout.size or 1) == 0:
            continue
        fits = [g for g in (16, 32, 64, 96, 128, 192, 256) if all(x.shape[1] % g == 0 for x, _ in quantized)]
        raise ZqError(
            f"'{layer.name}' has {k} inputs, which groups of {layout.size} do not divide; sizes that fit "
            f"every layer: {', '.join(map(str, fits)) or 'none of the usual ones'}; or use "
            f"{asked_as('zq')}, whose last group may be shorter"
        )


def _units(
    skeleton: Skeleton,
    index: CheckpointIndex,
    layers: list[PlannedLayer],
    exporter: ModuleType,
    dtype: torch.dtype,
) -> dict[int | str, list[Slot]]:
    """The output tensors of every unit, in the order of writing."""
    by_weight = {f"{layer.name}.weight": layer for layer in layers if layer.scheme}
    units: dict[int | str, list[Slot]] = {}
    for unit in ("outside", *range(skeleton.n_blocks), "tail"):
        slots: list[Slot] = []
        for name in skeleton.zone(unit):
            if name in skeleton.tied:
                continue
            layer = by_weight.get(name)
            if layer and layer.scheme:
                slots += exporter.slots(layer.name, layer.scheme, layer.shape, dtype)
            else:
                info = index.tensors[skeleton.param_keys[name]]
                slots.append(Slot(name, info.dtype, info.shape))
        units[unit] = slots
    return units
