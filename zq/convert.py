"""From one format of quantized checkpoint to another, without quantizing again: the same values or none.

Every layer is unpacked, stated in the other format's terms, packed, unpacked again and compared: its
dequantized weight must be bit for bit the one it was. What cannot be said in the other format (codes it does
not have, scales its dtype does not hold) is refused with the reason before anything is published. All other
tensors, the tokenizer and the rest travel unchanged.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import yaml
from torch import Tensor

import zq
from zq.checkpoint.index import CheckpointIndex, main_dtype, read_index
from zq.checkpoint.job import Job
from zq.checkpoint.reader import reader
from zq.checkpoint.writer import ShardWriter, Slot, plan_shards
from zq.errors import AuditError, ZqError
from zq.export import EXPORTERS, schemes_of
from zq.models.build import shapes_only, stores_pooler
from zq.models.families import FAMILIES
from zq.models.find import load_config
from zq.models.layout import is_transposed, linear_shapes
from zq.numerics.qtensor import QTensor
from zq.numerics.scales import DTYPES
from zq.publish import companions, front_matter, how_to_use, write_beside
from zq.runtime.load import quantization_config, tensor_problems
from zq.spec import Scheme, TensorSpec

STALE = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")  # of the other format
REMEDY = "choose another format, or quantize again with a scheme that it holds"
ONLY_OURS = "of such layers zq writes its own format only"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to become what. `before` and `after` give each quantized layer its scheme, `shapes` its [N, K];
    `dtype` is the one of the model."""

    folder: Path
    index: CheckpointIndex
    source: ModuleType
    target: ModuleType
    to: str
    before: dict[str, Scheme]
    after: dict[str, Scheme]
    shapes: dict[str, tuple[int, int]]
    skipped: list[str]
    dtype: torch.dtype

    def old_slots(self, name: str) -> list[Slot]:
        return self.source.slots(name, self.before[name], self.shapes[name], self.dtype)

    def new_slots(self, name: str) -> list[Slot]:
        return self.target.slots(name, self.after[name], self.shapes[name], self.dtype)

    @property
    def copied(self) -> list[str]:
        """Tensors that stay as they are."""
        theirs = {slot.name for name in self.before for slot in self.old_slots(name)}
        return [name for name in self.index.tensors if name not in theirs]


def plan_conversion(folder: Path, to: str, *, plain: bool = False) -> Conversion:
    """plain: a checkpoint that is not quantized will do, without layers to convert. Raises ZqError when it is
    not quantized, or the format cannot hold one of its layers."""
    if to not in EXPORTERS:
        raise ZqError(f"format '{to}' is unknown; allowed: {', '.join(EXPORTERS)}")
    stored = quantization_config(folder)
    if stored is None and not plain:
        raise ZqError(f"{folder} is not quantized; give zq quantize this model, a scheme and --to {to}")
    target = EXPORTERS[to]
    config, index = load_config(folder), read_index(folder)
    pooler = stores_pooler(FAMILIES[config.model_type], index.tensors)
    model = shapes_only(config, str(folder), pooler=pooler)
    shapes = linear_shapes(model)
    source, before = schemes_of(stored, index, shapes) if stored else (target, {})
    float_slots = {s.name: s for n, x in before.items() for s in source.slots(n, x, shapes[n], torch.float32)}
    dtype = main_dtype(index, float_slots)
    after: dict[str, Scheme] = {}
    for name, scheme in before.items():
        flip = is_transposed(model.get_submodule(name))
        after[name], reason = _stated(scheme, target, shapes[name], flip, dtype)
        if reason:
            remedy = ONLY_OURS if flip else REMEDY
            raise ZqError(f"{to} cannot hold '{name}' of {folder}, {scheme}: {reason}; {remedy}")
    problems = tensor_problems(index, model, before, {s.name: s for s in float_slots.values()})
    if problems:
        raise ZqError(f"{folder}: {next(iter(problems.values()))}; quantize or download again")
    every = linear_shapes(shapes_only(config, str(folder)))  # with a pooler that this checkpoint lacks
    skipped = [name for name in every if name not in before]
    reason = target.refuse_all(after, skipped)
    if reason:
        raise ZqError(f"{folder} cannot become {to}: {reason}; {REMEDY}")
    return Conversion(
        folder=folder,
        index=index,
        source=source,
        target=target,
        to=to,
        before=before,
        after=after,
        shapes=shapes,
        skipped=skipped,
        dtype=dtype,
    )


def convert(
    plan: Conversion,
    out: Path,
    *,
    shard_bytes: int = 5_000_000_000,
    command: str = "",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Carry it out into the folder `out`; what zq_report.json will hold. Leaves nothing behind on failure.

    `progress` gets (layers done, layers). Raises ZqError when a value has no equal in the new format, and
    OutputError (disk).
    """
    if Path(os.path.realpath(plan.folder)) in Path(os.path.realpath(out)).parents:
        raise ZqError(f"{out} lies in {plan.folder}, the checkpoint it is made from; choose another -o")
    job = Job.begin(out, {"model": plan.index.fingerprint(), "format": plan.to})
    try:
        slots = [slot for name in plan.before for slot in plan.new_slots(name)]
        entries = (plan.index.tensors[name] for name in plan.copied)
        slots += [Slot(info.name, info.dtype, info.shape) for info in entries]
        writer = ShardWriter(job.shards, plan_shards(slots, shard_bytes))
        writer.create()
        hashes, notes = _write(plan, writer, progress)
        config = plan.target.config(plan.after, plan.skipped)
        report = {
            "zq": zq.__version__,
            "command": command,
            "format": plan.to,
            "converted_from": quantization_config(plan.folder),
            "quantization_config": config,
            "bytes_before": plan.index.nbytes,
            "bytes_after": sum(slot.nbytes for slot in slots),
            "schemes": sorted({str(scheme) for scheme in plan.after.values()}),
            "notes": notes,
            "tensors": hashes,
        }
        files = [file for file in companions(plan.folder) if file.name not in STALE]
        settings = {"quantization_config": config}
        write_beside(files, plan.folder, out, settings, report, _card(plan, report))
        writer.publish(out)
    except BaseException:  # an interrupt too: a conversion is not resumed, it is quick
        job.discard()
        raise
    else:
        job.finish()
    finally:
        job.release()
    return report


def restate(q: QTensor, spec: TensorSpec, dtype: torch.dtype, name: str) -> QTensor:
    """The same values under another spec of the same codes: scales in another dtype, two levels as one,
    zero points that are all zero. Raises ZqError when a scale would have to be rounded."""
    if not q.scale.isfinite().all():
        raise ZqError(f"'{name}' has scales that are not finite; quantize or download again")
    step = q.scale if q.sub is None or spec.two_level else q.scale.float() * q.sub
    stored = step.to(DTYPES[spec.scale_dtype] if spec.scale_dtype else dtype)
    if not torch.equal(stored.float(), step.float()):
        raise ZqError(
            f"'{name}' has scales that {str(stored.dtype).removeprefix('torch.')} does not hold exactly; "
            "quantize again into the format that you want (zq quantize --to ...)"
        )
    zero = q.zero
    if zero is None and not spec.symmetric:
        zero = torch.zeros(stored.shape, dtype=torch.int8)
    return replace(q, scale=stored, zero=zero, sub=q.sub if spec.two_level else None, spec=spec)


def _stated(
    scheme: Scheme, target: ModuleType, shape: tuple[int, int], transposed: bool, dtype: torch.dtype
) -> tuple[Scheme, str | None]:
    """The first way to say the scheme in the target's terms, or the reason why there is none."""
    weights = scheme.weights
    plain = replace(weights, scale_dtype=None)
    ways = [weights, plain, replace(plain, two_level=False)]
    reason = None
    for way in ways:
        stated = target.adapt(replace(scheme, weights=way))
        why = target.refuse(stated, shape, transposed, dtype)
        if why is None:
            return stated, None
        reason = why  # of the plainest way
    return scheme, reason


def _write(
    plan: Conversion, writer: ShardWriter, progress: Callable[[int, int], None]
) -> tuple[dict[str, str], list[str]]:
    """(sha256 of every tensor, notes)."""
    read = reader(plan.index)
    hashes: dict[str, str] = {}
    fine = wide = 0  # layers whose fp16 scales bf16 does not hold, whose fp32 scales the model's dtype
    for done, name in enumerate(plan.before, 1):
        scales, tensors = converted(plan, name)
        held = plan.after[name].weights.scale_dtype
        fine += held == "half" and bool((scales.bfloat16() != scales).any())
        wide += held == "fp32" and bool((scales.to(plan.dtype) != scales).any())
        hashes |= writer.write(tensors)
        progress(done, len(plan.before))
    for name in plan.copied:
        hashes |= writer.write(read([name]))
    notes = []
    if fine:
        notes.append(
            f"{fine} layers have fp16 scales that bf16 does not hold; serve with dtype float16 for the same "
            "values"
        )
    if wide and plan.to == "compressed-tensors":
        notes.append(
            f"{wide} layers have float32 scales, which servers keep from sm90 on and transformers rounds to "
            "the dtype of the model, unless quantization_config=CompressedTensorsConfig(dequantize=True)"
        )
    return hashes, notes


def converted(plan: Conversion, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """(scales, tensors) of a quantized layer in the other format, compared. Raises ZqError when a value has
    no equal there."""
    read = reader(plan.index)([slot.name for slot in plan.old_slots(name)])
    q = plan.source.unpack(name, read.__getitem__, plan.before[name], plan.shapes[name])
    stated = restate(q, plan.after[name].weights, plan.dtype, name)
    tensors = plan.target.pack(name, stated, plan.after[name])
    back = plan.target.unpack(name, tensors.__getitem__, plan.after[name], plan.shapes[name])
    if not torch.equal(back.dequantize(), q.dequantize()):
        raise AuditError(
            f"audit: '{name}' has other values in {plan.to}; please report this as a defect of zq"
        )
    return stated.scale, tensors


def _card(plan: Conversion, report: dict[str, Any]) -> str:
    """README.md: what it is, and where it comes from; the figures are on the card of that."""
    front = {**front_matter(plan.folder), "library_name": "transformers", "tags": ["zq", plan.to]}
    config: Any = load_config(plan.folder)
    auto = "AutoModel" if FAMILIES[config.model_type].encoder else "AutoModelForCausalLM"
    return f"""---
{yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip()}
---
# {plan.folder.resolve().name}, as {plan.to}

The weights of that checkpoint, value for value, written by zq {report["zq"]}; its figures hold for this one.
Schemes: {", ".join(report["schemes"])}.

{how_to_use(plan.folder, auto, plan.to, report["command"] or "zq.convert.convert")}
"""
