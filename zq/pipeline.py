"""The loop: one block in memory, quantized, measured, written, committed.

    result = quantize(make_plan(folder, recipe), out)

Two streams of hidden states run through the model: the float stream through the blocks as they were,
the quantized stream through the blocks as they became, activations quantized where the scheme says so.
Their relative distance after each block is the error that is shown. Both streams are saved with every
block, so a resumed run continues with the same bits.
"""

from __future__ import annotations

import copy
import ctypes
import hashlib
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import zq
from zq import autobits
from zq.audit import audit, audit_published
from zq.calibration import all_windows
from zq.checkpoint.index import COMPUTE, FLOATS
from zq.checkpoint.job import Job, check_output
from zq.checkpoint.prefetch import Prefetch
from zq.checkpoint.reader import Read
from zq.checkpoint.writer import ShardWriter
from zq.errors import AuditError, OutOfMemory, OutputError, OutputKept, ZqError, enough_memory
from zq.finite import finite
from zq.models.build import get
from zq.models.capture import Captured, capture_inputs, has_head, head
from zq.numerics.metrics import sqnr_db, tensor_hash
from zq.plan import Plan
from zq.publish import publish
from zq.quantizers.feeders import spreads
from zq.quantizers.links import block_links, folding
from zq.quantizers.method import Block, Layer, Needs, quantized_inputs

FACTS = ("smoothing", "held_out_loss", "training_loss")  # of steps, about a block
LARGE = 128 << 20  # bytes of a stream; larger ones are saved with a block only when
SAVE_EVERY = 60.0  # seconds have passed since the last time
LESS = "give fewer --samples and --generated, a shorter --length, or another --device"

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Result:
    """`report` is what zq_report.json holds."""

    out: Path
    report: dict[str, Any]


def quantize(
    plan: Plan,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress = lambda event: None,
    command: str = "",
) -> Result:
    """Carry out a plan into the folder `out`.

    `progress` gets {"unit", "error", "seconds", ...} after every unit, and before them what `autobits.settle`
    tells when the recipe has a budget of bits and the plan is not settled yet. Raises ZqError (nothing is
    left behind), OutputKept (disk; what is done is kept), OutOfMemory (likewise, if anything is done) or
    AuditError (what was written is not to be used).
    """
    started = time.monotonic()
    if plan.recipe.bits is not None:
        if not resume:
            check_output(out)
        plan = autobits.settle(plan, resume=out if resume else None, progress=progress)
    job = (Job.resume if resume else Job.begin)(out, _fingerprint(plan))
    writer = ShardWriter(job.shards, plan.shards)
    try:
        if job.done:
            writer.recall(out)
        else:  # also when a resumed job was killed before its files were all there
            writer.create()
        with enough_memory(LESS), Prefetch(plan.view.read) as read:
            facts = _run_units(plan, job, writer, progress, read)
        facts["audit"] = audit(plan, job.shards, job.done)
        report = _report(plan, job, facts, time.monotonic() - started, command)
        publish(plan, writer, out, report)
        audit_published(plan, out)
    except OutputError as error:
        if not job.done:  # nothing to continue
            job.discard()
            raise
        raise OutputKept(f"{error}; what is done is kept, continue with --resume") from None
    except AuditError:
        raise
    except OutOfMemory as error:
        if not job.done:
            job.discard()
            raise
        kept = f"what is done is kept: with more memory, continue with --resume, or delete {job.folder}"
        raise OutOfMemory(f"{error}; {kept}") from None
    except ZqError:
        job.discard()
        raise
    else:
        job.finish()
    finally:
        job.release()
    return Result(out, report)


@torch.no_grad()
def _run_units(
    plan: Plan, job: Job, writer: ShardWriter, progress: Progress, read: Prefetch
) -> dict[str, Any]:
    started = time.monotonic()
    windows, facts = all_windows(plan.windows, plan.recipe, plan.skeleton, read, job, progress, plan.written)
    spent = {"windows": time.monotonic() - started}
    captured = _capture(plan, read, windows)
    float_stream, quant_stream = _streams(job, captured)
    saved = time.monotonic()
    for unit in plan.units:
        if str(unit) in job.done:
            continue
        begun = time.monotonic()
        block = _load(plan, unit, read)
        if torch.device(plan.skeleton.device).type != "cpu":  # whose memory and cores are what the work needs
            read.expect(_keys_after(plan, unit))
        running = False
        if captured is not None and isinstance(unit, int):
            running = True
            _feed(plan, block, unit, captured, float_stream, quant_stream, read)
            float_stream = block.targets
        with block.seeded(torch.device(plan.skeleton.device)):
            for method, options in plan.steps:
                started = time.monotonic()
                method.run(block, options)
                spent[method.name] = spent.get(method.name, 0) + time.monotonic() - started
        tensors, report = _collect(plan, unit, block, read)
        if running:
            with quantized_inputs(block.layers):
                quant_stream = block.forward(quant_stream)
            report["output_error"] = _relative_error(quant_stream, float_stream)
            report |= finite(block.facts)
        report["tensors"] = writer.write(tensors)
        report["seconds"] = round(time.monotonic() - begun, 3)
        last = unit == plan.skeleton.n_blocks - 1
        lazily = running and not last and plan.stream_bytes > LARGE and time.monotonic() - saved < SAVE_EVERY
        job.commit(
            str(unit),
            report,
            _carry(float_stream, quant_stream) if running and not (last or lazily) else None,
            lazily=lazily,
        )
        saved = saved if lazily else time.monotonic()
        _unload(plan, unit, block)
        progress({"unit": block.name, "done": len(job.done), **report})
    return {"calibration": facts, "seconds_of": {what: round(seconds, 2) for what, seconds in spent.items()}}


def _capture(plan: Plan, read: Read, windows: Tensor | None) -> Captured | None:
    """Calibration tokens as inputs of the first block; None when there are none."""
    if windows is None:
        return None
    plan.skeleton.load_outside(read)
    captured = capture_inputs(plan.skeleton, list(windows.split(plan.batch)))
    plan.skeleton.unload_outside()
    return captured


def _streams(job: Job, captured: Captured | None) -> tuple[list[Tensor], list[Tensor]]:
    if captured is None:
        return [], []
    carried = job.carried()
    first = list(captured.hidden)
    captured.hidden.clear()  # the streams hold them from here on, and let go of them
    if not carried:
        return first, first
    device, n = first[0].device, len(first)
    return (
        [carried[f"float.{i}"].to(device) for i in range(n)],
        [carried[f"quant.{i}"].to(device) for i in range(n)],
    )


def _carry(float_stream: list[Tensor], quant_stream: list[Tensor]) -> dict[str, Tensor]:
    return {
        **{f"float.{i}": h for i, h in enumerate(float_stream)},
        **{f"quant.{i}": h for i, h in enumerate(quant_stream)},
    }


def _load(plan: Plan, unit: int | str, read: Read) -> Block:
    """Materialise a unit. Outside of the blocks only layers that a rule names are worked on."""
    skeleton = plan.skeleton
    if isinstance(unit, int):
        skeleton.load_block(unit, read)
    elif any(layer.unit == unit and layer.scheme for layer in plan.layers):
        (skeleton.load_tail if unit == "tail" else skeleton.load_outside)(read)
    layers = _layers(plan, unit)
    if not isinstance(unit, int):
        return Block(unit, None, layers, plan.dtype, plan.recipe.seed, [[layer] for layer in layers])
    prefix, by_name = skeleton.block_prefix(unit), {layer.name: layer for layer in layers}
    named = [[f"{prefix}.{path}" for path in site.linears] for site in skeleton.arch.sites]
    sites = [[by_name[name] for name in names if name in by_name] for names in named]
    module = skeleton.block(unit)
    block = Block(prefix, module, layers, plan.dtype, plan.recipe.seed, [site for site in sites if site])
    block.norms = skeleton.norms(unit)
    if any(Needs.SPREADS in method.needs(options) for method, options in plan.steps):
        found = spreads(skeleton, unit, read)
        block.spreads = [
            found.get(s.name) for s, site in zip(skeleton.arch.sites, sites, strict=True) if site
        ]
    if folding(plan.steps):
        block.links = block_links(skeleton, unit, layers, lambda name: COMPUTE[plan.source(name).dtype])
    return block


def _layers(plan: Plan, unit: int | str) -> list[Layer]:
    """The layers of a unit that the recipe quantizes."""
    modules = plan.skeleton.model
    return [
        Layer(p.name, p.kind, modules.get_submodule(p.name), p.transposed, p.scheme)
        for p in plan.layers
        if p.unit == unit and p.scheme
    ]


def _keys_after(plan: Plan, unit: int | str) -> list[str]:
    """The checkpoint keys of the block after this unit; none where no block follows."""
    following = unit + 1 if isinstance(unit, int) else 0 if unit == "outside" else plan.skeleton.n_blocks
    if following >= plan.skeleton.n_blocks:
        return []
    return [plan.skeleton.key_of(name) for name in plan.skeleton.zone(following)]


def _unload(plan: Plan, unit: int | str, block: Block) -> None:
    if isinstance(unit, int):
        for i in range(unit, unit + 1 + len(block.ahead)):
            plan.skeleton.unload_block(i)
        if block.logits is not None:
            plan.skeleton.unload_outside()
            plan.skeleton.unload_tail()
    else:
        (plan.skeleton.unload_tail if unit == "tail" else plan.skeleton.unload_outside)()
    with suppress(OSError, AttributeError):  # glibc keeps freed pages between live ones: 1-2 MB per block
        ctypes.CDLL(None).malloc_trim(0)


def _collect(plan: Plan, unit: int | str, block: Block, read: Read) -> tuple[dict[str, Tensor], dict]:
    """The output tensors of a unit, and what was measured on its layers.

    Tensors that no step touches are copied as they are in the checkpoint; what a step changed beside the
    quantized weights is written as changed. Both keep their own dtype.
    """
    tensors: dict[str, Tensor] = {}
    measured: dict[str, dict[str, Any]] = {}
    skeleton = plan.skeleton
    for layer in block.layers:
        q = layer.quantized
        assert q is not None, layer.name  # zq/methods.py refuses steps of which none quantizes
        tensors.update(plan.exporter.pack(layer.name, q, layer.scheme))
        if not bool(torch.isfinite(layer.weight).all()):
            raise ZqError(
                f"'{layer.name}.weight' reaches the limit of {plan.dtype} and overflows as {layer.scheme}; "
                "scale the weights down or skip the layer with a rule"
            )
        measured[layer.name] = {
            "scheme": str(layer.scheme),
            "kind": layer.kind or "other",
            "sqnr_db": sqnr_db(layer.original, layer.weight),
            "dequantized_sha256": tensor_hash(layer.weight),
        }
    promised = [slot.name for slot in plan.units[unit] if slot.name not in tensors]
    keys = {name: skeleton.param_keys[name] for name in promised}
    originals = read(keys.values())
    for name, key in keys.items():
        if plan.view.index.tensors[key].dtype in FLOATS and not bool(torch.isfinite(originals[key]).all()):
            raise ZqError(f"'{key}' holds NaN or Inf; repair the checkpoint first")
        changed = name in block.changed
        tensors[name] = get(skeleton.model, name).to(originals[key].dtype) if changed else originals[key]
    changed = {name: tensor_hash(get(skeleton.model, name)) for name in sorted(block.changed)}
    return tensors, {"layers": measured, "changed": changed}


def _feed(
    plan: Plan,
    block: Block,
    index: int,
    captured: Captured,
    float_stream: list[Tensor],
    quant_stream: list[Tensor],
    read: Read,
) -> None:
    """Give a block, still as it was, what its steps need."""
    block.calls = captured.calls[index]
    block.inputs = quant_stream
    block.targets = block.forward(float_stream)
    needed = [method.needs(options) for method, options in plan.steps]
    if any(need & (Needs.FLOAT_INPUTS | Needs.TEACHER) for need in needed):
        block.teacher_inputs = float_stream
    if any(Needs.TEACHER in need for need in needed):
        block.teacher = copy.deepcopy(block.module)
    _look_ahead(plan, block, index, captured, read)


def _look_ahead(plan: Plan, block: Block, index: int, captured: Captured, read: Read) -> None:
    """Load the float blocks behind this one, and the head, as far as a step looks ahead."""
    skeleton = plan.skeleton
    distance = max(method.ahead(options) for method, options in plan.steps)
    for i in range(index + 1, min(index + 1 + distance, skeleton.n_blocks)):
        skeleton.load_block(i, read)
        block.ahead.append((skeleton.block(i), captured.calls[i]))
    if block.ahead:
        block.following = _layers(plan, index + 1)
    if index + distance >= skeleton.n_blocks and has_head(skeleton):
        skeleton.load_outside(read)  # a tied head takes its weight from there
        skeleton.load_tail(read)
        block.logits = partial(head, skeleton)


def _relative_error(candidate: list[Tensor], reference: list[Tensor]) -> float | None:
    """||candidate - reference||^2 / ||reference||^2 over all tokens; None when either holds NaN or Inf."""
    pairs = list(zip(candidate, reference, strict=True))
    error = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    error /= max(sum(float(b.float().square().sum()) for _, b in pairs), 1e-30)
    return finite(error)


def _overflow(plan: Plan, errors: dict[str, float | None]) -> list[str]:
    """A note about the first block whose output error could not be computed."""
    first = next((unit for unit, error in errors.items() if error is None), None)
    dtype = str(plan.dtype).removeprefix("torch.")
    return [f"activations overflow {dtype} from block {first} on"] if first is not None else []


def _fingerprint(plan: Plan) -> dict[str, str]:
    """What must be the same for a job to be continued."""
    layout = hashlib.sha256()
    for shard in plan.shards:
        layout.update(shard.file.encode() + shard.header())
    return {
        "model": plan.index.fingerprint(),
        "recipe": plan.recipe.digest,
        "calibration text": "none" if plan.windows is None else tensor_hash(plan.windows),
        "shard size": layout.hexdigest(),
        "zq version": zq.__version__,
        "torch version": torch.__version__,
        "transformers version": transformers.__version__,
        "device": str(plan.skeleton.device),
        **autobits.fingerprint(plan),
    }


def _report(plan: Plan, job: Job, facts: dict[str, Any], seconds: float, command: str) -> dict[str, Any]:
    layers = {name: m for unit in job.done.values() for name, m in unit["layers"].items()}
    kinds: dict[str, list[float]] = {}
    for measured in layers.values():
        kinds.setdefault(measured["kind"], []).append(measured["sqnr_db"])
    errors = {u: r["output_error"] for u, r in job.done.items() if "output_error" in r}
    return {
        "zq": zq.__version__,
        "torch": torch.__version__,
        "command": command,
        "format": plan.format,
        "recipe": str(plan.recipe),
        "source_fingerprint": plan.index.identity(),
        "quantization_config": plan.quantization_config,
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "weight_sqnr_db": {kind: sum(v) / len(v) for kind, v in sorted(kinds.items())},
        "output_error": errors,
        "changed": {u: list(r["changed"]) for u, r in job.done.items() if r["changed"]},
        **{fact: {u: r[fact] for u, r in job.done.items() if fact in r} for fact in FACTS},
        "seconds": round(seconds, 2),
        **({"sensitivity": plan.sensitivity} if plan.sensitivity else {}),
        "notes": plan.notes + _overflow(plan, errors),
        **plan.view.facts,
        **facts,
        "layers": layers,
        "tensors": {name: h for unit in job.done.values() for name, h in unit["tensors"].items()},
    }
