"""The audit: read the output back as a stranger would, and compare it with what the run measured.

Streaming, one layer at a time: every planned tensor is there with its dtype and shape and nothing else
is; every layer that the plan quantizes unpacks to exactly the weight that was measured; scales are
finite and positive; tensors that a step changed are those that the plan names, with the values that were
measured; untouched tensors are byte-identical to the source, or to what a step on the whole model (rotate)
makes of it, computed anew; and the `quantization_config` that will be published, read by its own rules, gives
every layer the planned scheme and no other.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from zq.checkpoint.index import read_header, read_index
from zq.checkpoint.reader import reader
from zq.errors import AuditError, ZqError
from zq.numerics.metrics import tensor_hash
from zq.plan import Plan, PlannedLayer
from zq.runtime.load import quantization_config
from zq.spec import AS_FP16, Scheme

REPORT = "zq_report.json"


def audit(plan: Plan, folder: Path, done: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Check the shards in `folder` against the plan and the reports. Raises AuditError naming the tensor."""
    places = _check_headers(plan, folder)
    measured = {name: m for report in done.values() for name, m in report["layers"].items()}
    written = {name: digest for report in done.values() for name, digest in report["tensors"].items()}
    changed = {name: digest for report in done.values() for name, digest in report["changed"].items()}
    _check_config(plan, plan.quantization_config)
    seen: set[str] = set()
    for layer in plan.layers:
        if layer.scheme:
            names = [slot.name for slot in plan.layer_slots(layer)]
            tensors = {name: _read(places[name], name) for name in names}
            _check_layer(plan, layer, tensors, measured)
            _check_hashes(tensors, written)
            seen.update(names)
    for name in places:
        if name not in seen:
            tensor = _read(places[name], name)
            _check_hashes({name: tensor}, written)
            if name in changed:
                _check_changed(plan, name, tensor, changed[name])
            else:
                _check_copy(plan, name, tensor)
    return {
        "passed": True,
        "tensors": len(places),
        "quantized_layers": len(plan.assigned),
        "changed_tensors": len(changed),
        "untouched_tensors": len(places) - len(seen) - len(changed),
    }


def audit_folder(folder: Path) -> dict[str, Any]:
    """Compare a published folder with the hashes of the run that made it. Raises AuditError or ZqError."""
    path = folder / REPORT
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        hashes, config = report["tensors"], report["quantization_config"]
        settings = report.get("rotated", {}).get("config", {})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ZqError(
            f"{folder} has no readable {REPORT} to compare with; only what `zq quantize` wrote has one"
        ) from None
    index = read_index(folder)
    for name in sorted(set(hashes) ^ set(index.tensors)):
        state = "is missing" if name in hashes else "was not written by the run"
        raise AuditError(f"audit: tensor '{name}' {state}; quantize again")
    read = reader(index)
    for name in index.tensors:
        _check_hashes(read([name]), hashes)
    if quantization_config(folder) != config:
        raise AuditError(
            f"audit: quantization_config in {folder / 'config.json'} is not that of the run; quantize again"
        )
    _check_settings(settings, folder)
    return {"passed": True, "tensors": len(hashes)}


def audit_published(plan: Plan, folder: Path) -> None:
    """What `audit` could not see before the files were in place: headers and config.json, as published.

    Raises AuditError.
    """
    _check_headers(plan, folder)
    try:
        _check_config(plan, quantization_config(folder) or {})
        _check_settings(plan.view.settings, folder)
    except AuditError:
        raise
    except ZqError as error:
        raise AuditError(f"audit: {error}") from None


def _check_headers(plan: Plan, folder: Path) -> dict[str, Path]:
    places: dict[str, Path] = {}
    for shard in plan.shards:
        try:
            entries = {info.name: info for info in read_header(folder / shard.file)}
        except ZqError as error:
            raise AuditError(f"audit: {error}") from None
        promised = {slot.name: slot for slot in shard.slots}
        for name in sorted(set(entries) ^ set(promised)):
            state = "is missing from" if name in promised else "should not be in"
            raise AuditError(f"audit: tensor '{name}' {state} {shard.file}; run again into a new folder")
        for name, slot in promised.items():
            info = entries[name]
            if (info.dtype, info.shape) != (slot.dtype, slot.shape):
                raise AuditError(
                    f"audit: tensor '{name}' is {info.dtype} {info.shape}, planned {slot.dtype} {slot.shape}"
                )
            places[name] = folder / shard.file
    return places


def _check_layer(
    plan: Plan, layer: PlannedLayer, tensors: dict[str, Tensor], measured: dict[str, dict[str, Any]]
) -> None:
    assert layer.scheme is not None
    for name, tensor in tensors.items():
        is_scale = name.endswith(("_scale", "_scale_inv", ".scales"))
        if is_scale and not bool((torch.isfinite(tensor) & (tensor != 0)).all()):
            raise AuditError(f"audit: '{name}' holds a scale that is zero, NaN or Inf")
        is_factor = name.endswith(("_lorc_a", "_lorc_b"))
        if is_factor and not bool(torch.isfinite(tensor).all()):
            raise AuditError(f"audit: '{name}' holds a low-rank factor with NaN or Inf")
        beside = name.endswith(("_center", "_codebook", "_kept"))
        if beside and not bool(torch.isfinite(tensor).all()):
            raise AuditError(f"audit: '{name}' holds NaN or Inf")
    if layer.name not in measured:
        raise AuditError(f"audit: layer '{layer.name}' was planned but never measured")
    try:
        q = plan.exporter.unpack(layer.name, tensors.__getitem__, layer.scheme, layer.shape)
    except ZqError as error:
        raise AuditError(f"audit: layer '{layer.name}' does not unpack: {error}") from None
    if tensor_hash(q.dequantize(plan.dtype)) != measured[layer.name]["dequantized_sha256"]:
        raise AuditError(
            f"audit: the weight of '{layer.name}' read from disk is not the weight that was measured; "
            "the disk or memory is unreliable, run again into a new folder"
        )


def _check_hashes(tensors: dict[str, Tensor], written: dict[str, str]) -> None:
    for name, tensor in tensors.items():
        if tensor_hash(tensor) != written.get(name):
            raise AuditError(
                f"audit: the bytes of tensor '{name}' on disk are not those that were written; quantize again"
            )


def _check_changed(plan: Plan, name: str, tensor: Tensor, measured: str) -> None:
    if name not in plan.may_change:
        raise AuditError(
            f"audit: tensor '{name}' was changed, which no step of the plan may do; quantize again"
        )
    if tensor_hash(tensor.to(plan.dtype)) != measured:
        raise AuditError(
            f"audit: tensor '{name}' read from disk is not what the run measured with; the disk or memory is "
            "unreliable, run again into a new folder"
        )


def _check_copy(plan: Plan, name: str, tensor: Tensor) -> None:
    key = plan.skeleton.param_keys[name]
    original = plan.view.read([key])[key]
    if not torch.equal(original.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)):
        was = f"({plan.view.becomes[name]})" if name in plan.view.becomes else "unchanged"
        raise AuditError(f"audit: tensor '{name}' was to be copied {was} but differs from '{key}'")


def _check_config(plan: Plan, config: dict[str, Any]) -> None:
    read_back = plan.exporter.schemes(config, [layer.name for layer in plan.layers])
    for layer in plan.layers:
        if _stored(read_back.get(layer.name)) != _stored(layer.scheme):
            raise AuditError(
                f"audit: config.json would give '{layer.name}' the scheme {read_back.get(layer.name)} "
                f"instead of {layer.scheme}"
            )


def _check_settings(settings: dict[str, Any], folder: Path) -> None:
    """What a step changed in config.json beside the quantization; engines would tie a rotated embedding."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for key, value in settings.items():
        if config.get(key) != value:
            raise AuditError(
                f"audit: '{key}' in {folder / 'config.json'} is {config.get(key)}, and the weights were made "
                f"for {value}; quantize again"
            )


def _stored(scheme: Scheme | None) -> Scheme | None:
    """The scheme as every config can say it: a narrow range shows in the codes only, `half` and
    `short` in the scales."""
    if scheme is None:
        return None
    held = scheme.weights.scale_dtype
    stored = "fp16" if held in AS_FP16 else held
    return replace(scheme, weights=replace(scheme.weights, narrow=False, scale_dtype=stored))


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as shard:
        return shard.get_tensor(name).clone()
