"""zq.load: any checkpoint that zq wrote, or an original one, as a transformers model.

Quantized layers become QuantLinear whatever format they were stored in, so figures from two formats
are comparable, and compressed-tensors checkpoints load without that library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from zq.checkpoint.index import CheckpointIndex, main_dtype, read_index
from zq.checkpoint.reader import reader
from zq.errors import ZqError
from zq.export import exporter_for, native
from zq.models.build import shapes_only
from zq.models.find import load_config, model_class
from zq.runtime.linear import is_linear, linear_shape


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a folder's config.json, or None. Raises ZqError when unreadable."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise ZqError(f"cannot read {folder / 'config.json'} ({error}); give a checkpoint folder") from None


def load(folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """A transformers model in eval mode on `device`, computing in `dtype` (default: as stored).

    Raises ZqError for an unreadable or foreign checkpoint, and when tensors are missing or left over.
    """
    folder = Path(folder)
    stored = quantization_config(folder)
    index = read_index(folder)
    config = load_config(folder)
    cls: Any = model_class(config)
    dtype = dtype or main_dtype(index)
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # `_check` refuses them, naming one
    if stored is None or exporter_for(stored, str(folder)) is native:
        shapes_only(config, str(folder))  # a config that fits no model is bad input, not a defect
        model, info = cls.from_pretrained(str(folder), **options)
    else:
        state, config.quantization_config = _as_native(index, config, stored, str(folder))
        model, info = cls.from_pretrained(None, config=config, state_dict=state, **options)
    _check(info, str(folder))
    return model.to(device).eval()


def _as_native(
    index: CheckpointIndex, config: Any, stored: dict[str, Any], where: str
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint of another format as tensors and config of zq's own."""
    exporter = exporter_for(stored, where)
    model = shapes_only(config, where)
    linears = {name: linear_shape(m) for name, m in model.named_modules() if is_linear(m)}
    read = reader(index)
    state = {}
    assigned = exporter.schemes(stored, linears)
    used: set[str] = set()
    for name, scheme in assigned.items():
        q = exporter.unpack(name, lambda key: read([key])[key], scheme, linears[name])
        state.update(native.pack(name, q, scheme))
        used |= {slot.name for slot in exporter.slots(name, scheme, linears[name], torch.float32)}
    rest = [name for name in index.tensors if name not in used]
    return {**state, **read(rest)}, native.config(assigned, [])


def _check(info: dict[str, Any], where: str) -> None:
    """transformers only logs what it could not load; a quantized model must not have random weights."""
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(key):
            names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[key])
            raise ZqError(
                f"{where}: {len(names)} {key[:-5]} tensors, first '{names[0]}'; the weights do not belong "
                "to this config, quantize or download again"
            )
