"""zq.load: any checkpoint that zq wrote, or an original one, as a transformers model.

Quantized layers become QuantLinear whatever format they were stored in, so figures from two formats
are comparable, and compressed-tensors checkpoints load without that library.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from zq.checkpoint.index import CheckpointIndex, main_dtype, read_index
from zq.checkpoint.reader import reader
from zq.checkpoint.writer import Slot
from zq.errors import ZqError
from zq.export import native, schemes_of
from zq.models import names
from zq.models.build import class_options, shapes_only, stores_pooler
from zq.models.families import FAMILIES
from zq.models.find import load_config, model_class
from zq.models.layout import linear_shapes
from zq.runtime.serving import serve_linears
from zq.spec import Scheme

SCALES = ("BF16", "F16", "F32")
TOGETHER = 8  # layers that are read at a time: opening a file takes longer than reading a small one


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """`quantization_config` of a folder's config.json, or None. Raises ZqError when unreadable."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ZqError(f"cannot read {file} ({error}); give a checkpoint folder") from None
    if not isinstance(config, dict):
        raise ZqError(f"{file} holds a {type(config).__name__}, not a JSON object; download it again")
    found = config.get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise ZqError(f"{folder}: quantization_config is {found!r}, not a mapping; download it again")
    return found


def load(
    folder: str | Path, *, device: str = "cpu", dtype: torch.dtype | None = None, kernels: bool = True
) -> Any:
    """A transformers model in eval mode on `device`, computing in `dtype` (default: as stored).

    kernels: on a CUDA device, quantized layers are packed for zq's operators, which compute what was measured
    up to the rounding of their outputs; such a model cannot be saved. False, and always on a CPU: the
    simulation that zq's accuracy figures mean, from codes that can be saved again.

    Raises ZqError for an unreadable or foreign checkpoint, and when tensors are missing, left over or of
    another shape.
    """
    folder = Path(folder)
    where = str(folder)
    stored = quantization_config(folder)
    index = read_index(folder)
    config = load_config(folder)
    cls: Any = model_class(config)
    pooler = stores_pooler(FAMILIES[config.model_type], index.tensors)
    bare = shapes_only(config, where, pooler=pooler)  # a config that fits no model is bad input, not a defect
    layers = linear_shapes(bare)
    exporter, assigned = schemes_of(stored, index, layers) if stored is not None else (native, {})
    slots = {s.name: s for n, x in assigned.items() for s in exporter.slots(n, x, layers[n], torch.float32)}
    for kind, wrong in tensor_problems(index, bare, assigned, slots).items():
        if stored is not None or kind in ("shapes", "dtypes"):  # `_check` for the others of an original
            raise ZqError(f"{where}: {wrong}; quantize or download again")
    options: dict[str, Any] = {
        "dtype": dtype or main_dtype(index, slots),
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # `_check` refuses them, naming one
        **class_options(cls, pooler=pooler),
    }
    if stored is not None:
        config.quantization_config = native.config(assigned, [])
    if exporter is native:
        model, info = cls.from_pretrained(where, config=config, **options)
    else:
        read = reader(index)
        state = read([name for name in index.tensors if name not in slots])
        every = list(assigned.items())
        for part in (every[i : i + TOGETHER] for i in range(0, len(every), TOGETHER)):
            wanted = (exporter.slots(name, scheme, layers[name], torch.float32) for name, scheme in part)
            held = read([slot.name for of_layer in wanted for slot in of_layer])
            for name, scheme in part:
                q = exporter.unpack(name, held.__getitem__, scheme, layers[name])
                state.update(native.pack(name, q, scheme))
        model, info = cls.from_pretrained(None, config=config, state_dict=state, **options)
    _check(info, where)
    if kernels and torch.device(device).type == "cuda":
        serve_linears(model, torch.device(device))  # one after the other; the rest follows
    return model.to(device).eval()


def load_decoder(folder: str | Path, *, device: str = "cpu", kernels: bool = False) -> Any:
    """`load`, for what predicts tokens. Raises ZqError when the model has no language-model head."""
    model = load(folder, device=device, kernels=kernels)
    if model.get_output_embeddings() is None:
        raise ZqError(
            f"{folder} holds a {type(model).__name__}, which has no language-model head and predicts no "
            "tokens; start from a checkpoint of the whole model"
        )
    return model


def tensor_problems(
    index: CheckpointIndex, bare: torch.nn.Module, assigned: dict[str, Scheme], slots: dict[str, Slot]
) -> dict[str, str]:
    """What does not fit between the headers of a checkpoint and its model, one line each: {"missing",
    "shapes", "dtypes", "extra": text}, only those that there are. `bare` is the model on meta, `slots` the
    tensors of its quantized layers by name."""
    wanted = {name: tuple(tensor.shape) for name, tensor in bare.state_dict().items()}
    for name in assigned:
        del wanted[f"{name}.weight"]
    wanted |= {name: tuple(slot.shape) for name, slot in slots.items()}
    model: Any = bare
    matched = names.match(wanted, index.tensors, str(model.base_model_prefix))
    tied = model.all_tied_weights_keys
    missing = [name for name in matched.missing if tied.get(name, name) not in matched.found]
    wrong = sorted(key for name, key in matched.found.items() if index.tensors[key].shape != wanted[name])
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    extra = [
        key
        for key in names.extra(matched.found, index.tensors)
        if not any(re.search(pattern, key) for pattern in ignored)
    ]
    plain = {name: "F32" for name, tensor in bare.state_dict().items() if tensor.is_floating_point()}
    kept = plain | {name: slot.dtype for name, slot in slots.items()}
    there = {key: kept[name] for name, key in matched.found.items() if name in kept}
    kinds = sorted(key for key, dtype in there.items() if not _holds(index.tensors[key].dtype, dtype))
    problems = {}
    if missing:
        problems["missing"] = f"{len(missing)} tensors are missing, first '{missing[0]}'"
    if wrong:
        shape = next(wanted[name] for name, key in matched.found.items() if key == wrong[0])
        problems["shapes"] = (
            f"{len(wrong)} tensors do not have the shape that config.json asks for, first "
            f"'{wrong[0]}' with {list(index.tensors[wrong[0]].shape)} instead of {list(shape)}"
        )
    if kinds:
        wanted_dtype = " or ".join(SCALES) if there[kinds[0]] in SCALES else there[kinds[0]]
        problems["dtypes"] = (
            f"{len(kinds)} tensors do not have the dtype of this format, first '{kinds[0]}' with "
            f"{index.tensors[kinds[0]].dtype} instead of {wanted_dtype}"
        )
    if extra:
        problems["extra"] = f"{len(extra)} tensors belong to no part of this model, first '{extra[0]}'"
    return problems


def _holds(found: str, wanted: str) -> bool:
    """Whether a tensor of this dtype can be in that place; scales, and what is not quantized, may have any
    width of their own."""
    return found == wanted or (found in SCALES and wanted in SCALES)


def _check(info: dict[str, Any], where: str) -> None:
    """transformers only logs what it could not load; a quantized model must not have random weights."""
    for key in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if info.get(key):
            found = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[key])
            raise ZqError(
                f"{where}: {len(found)} {key[:-5]} tensors, first '{found[0]}'; the weights do not belong "
                "to this config, quantize or download again"
            )
