"""One GGUF file for llama.cpp from a checkpoint, quantized or not, with the same values.

Quantized layers become the blocks that hold them exactly (zq/export/ggml.py), matrices that are not quantized
stay in their dtype, norms and biases are float32, as llama.cpp wants them. llama.cpp rotates neighbouring
values of a head where transformers rotates halves, so for its `llama` architecture the rows of q and k are
interleaved. Metadata and tokenizer come from the checkpoint; names, metadata and the file from the `gguf`
package. Every block is decoded by that package before it is written, and compared.

Architectures: Llama, Mistral, Qwen2, Qwen3 with a byte-level BPE tokenizer.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zq.checkpoint.index import COMPUTE
from zq.checkpoint.reader import reader, same_tensor
from zq.checkpoint.writer import disk_error
from zq.convert import Conversion, plan_conversion
from zq.errors import AuditError, ZqError
from zq.export import ggml
from zq.models.find import load_config, load_tokenizer
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme

FILE = "model.gguf"  # in a folder
ARCHS = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# llama.cpp's enum llama_ftype
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q4_K": 14, "Q6_K": 18, "BF16": 32}
FLOATS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PATTERNS = {WORDS % r"\p{N}{1,3}": "llama-bpe", WORDS % r"\p{N}": "qwen2"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # llama.cpp's token types


def refuse(assigned: dict[str, Scheme], shapes: dict[str, tuple[int, int]], folder: Path) -> None:
    """Raises ZqError when llama.cpp could not hold these layers, this architecture or its tokenizer."""
    if importlib.util.find_spec("gguf") is None:
        raise ZqError("GGUF needs the package gguf; pip install gguf")
    config = load_config(folder)
    if config.model_type not in ARCHS:
        raise ZqError(f"zq writes no GGUF of {config.model_type} models; of: {', '.join(ARCHS)}")
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise ZqError(
            f"zq writes no GGUF of models with {rope['rope_type']} position scaling; use another format"
        )
    for name, scheme in assigned.items():
        reason = ggml.refuse(scheme, shapes[name])
        if reason:
            raise ZqError(f"gguf cannot hold '{name}' as {scheme}: {reason}; quantize with another scheme")
    _vocabulary(config, folder)


def write(
    folder: Path, file: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """The checkpoint in `folder` as `file`; {"file", "bytes", "types": layers of each type, "notes"}.

    `progress` gets (tensors written, tensors). Raises ZqError. Half a file is never left behind.
    """
    plan = plan_file(folder)
    temporary = file.with_name(f".{file.name}.part")
    try:
        types = _write(plan, temporary, progress)
        os.replace(temporary, file)
    except OSError as error:
        raise disk_error(error, file, 0) from None
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "file": str(file),
        "bytes": file.stat().st_size,
        "types": dict(types),
        "notes": _notes(load_config(folder)),
    }


def is_beside(folder: Path) -> bool:
    """Whether zq quantize --to gguf left its file beside this checkpoint; an empty or other one is none."""
    file = folder / FILE
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def plan_file(folder: Path) -> Conversion:
    """What `write` will write of the checkpoint in `folder`. Raises ZqError as `refuse` does."""
    plan = plan_conversion(folder, "zq", plain=True)
    refuse(plan.before, plan.shapes, folder)
    return plan


@dataclass(frozen=True)
class Item:
    """One tensor of the file: llama.cpp's type, its bytes as uint8 [..., bytes per row], made when needed."""

    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def _write(plan: Conversion, file: Path, progress: Callable[[int, int], None]) -> Counter[str]:
    import gguf

    config: Any = load_config(plan.folder)
    kind = gguf.MODEL_ARCH[ARCHS[config.model_type]]
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = [*(f"{layer}.weight" for layer in plan.before), *plan.copied]
    head, source = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and head in tensors and same_tensor(plan.index, head, source):
        tensors.remove(head)
    items = {name: _item(plan, name, config) for name in tensors}
    types = Counter(items[f"{layer}.weight"].kind for layer in plan.before)
    types = types or Counter(
        items[f"{layer}.weight"].kind for layer in plan.shapes if f"{layer}.weight" in items
    )
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind])
    _metadata(writer, config, plan.folder, types.most_common(1)[0][0])
    _tokenizer(writer, config, plan.folder)
    for name, item in items.items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if own is None:
            raise ZqError(f"llama.cpp has no place for the tensor '{name}'; use another format")
        raw = gguf.GGMLQuantizationType[item.kind]
        writer.add_tensor_info(own, item.shape, np.dtype(np.uint8), math.prod(item.shape), raw)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for done, item in enumerate(items.values(), 1):
        writer.write_tensor_data(item.make().numpy())
        progress(done, len(items))
    writer.close()
    return types


def _item(plan: Conversion, name: str, config: Any) -> Item:
    layer = name.removesuffix(".weight")
    rows = _rows(name, config)
    if layer in plan.before:
        kind, blocks = blocks_of(plan, layer, rows)
        return Item(kind, tuple(blocks.shape), lambda: blocks_of(plan, layer, rows)[1])
    info = plan.index.tensors[name]
    dtype = torch.float32 if len(info.shape) == 1 else COMPUTE[info.dtype]

    def make() -> Tensor:
        values = reader(plan.index)([name])[name].to(dtype)
        values = values if rows is None else values[rows]
        return values.contiguous().view(torch.uint8)

    return Item(FLOATS[dtype], (*info.shape[:-1], info.shape[-1] * dtype.itemsize), make)


def blocks_of(plan: Conversion, layer: str, rows: Tensor | None = None) -> tuple[str, Tensor]:
    """(type, blocks [N, bytes]) of a quantized layer, decoded and compared. `rows`: another order of its
    outputs. Raises ZqError when a value has no equal."""
    import gguf

    read = reader(plan.index)([slot.name for slot in plan.old_slots(layer)])
    q = plan.source.unpack(layer, read.__getitem__, plan.before[layer], plan.shapes[layer])
    if rows is not None:
        q = _reordered(q, rows)
    try:
        kind, blocks = ggml.encode(q)
    except ZqError as error:
        raise ZqError(f"'{layer}': {error}; quantize again with --to gguf") from None
    back = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    if not torch.equal(torch.from_numpy(back), q.dequantize()):
        raise AuditError(f"audit: '{layer}' has other values as {kind}; report this as a defect of zq")
    return kind, blocks


def _rows(name: str, config: Any) -> Tensor | None:
    """The order of the output channels of q and k for llama.cpp's `llama`, or None."""
    part = next((p for p in ("q_proj", "k_proj") if f".{p}." in name), None)
    if part is None or ARCHS[config.model_type] != "LLAMA":
        return None
    heads = config.num_attention_heads if part == "q_proj" else config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return torch.arange(heads * width).reshape(heads, 2, width // 2).transpose(1, 2).reshape(-1)


def _reordered(q: QTensor, rows: Tensor) -> QTensor:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return tensor[rows] if tensor is not None and len(tensor) == len(rows) else tensor

    scale = pick(q.scale)
    assert scale is not None
    return QTensor(q.codes[rows], scale, pick(q.zero), pick(q.sub), q.spec)


def _metadata(writer: Any, config: Any, folder: Path, kind: str) -> None:
    writer.add_name(folder.name)
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(2)  # of llama.cpp's block layouts
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(width)
    writer.add_key_length(width)
    writer.add_value_length(width)


def _notes(config: Any) -> list[str]:
    window = getattr(config, "sliding_window", None)
    if not window or not getattr(config, "use_sliding_window", True):
        return []
    return [
        f"this model looks {window} tokens back, and llama.cpp lets it see its whole context: the same up to "
        f"{window} tokens"
    ]


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp is told of a tokenizer."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]  # "bos", "eos", "pad", "unk"
    add_bos: bool
    template: str | list[dict[str, str]] | None


def _vocabulary(config: Any, folder: Path) -> Vocabulary:
    """Raises ZqError when llama.cpp has no such tokenizer."""
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        entries = [(text, i, NORMAL) for text, i in data["model"]["vocab"].items()]
        pre = _pre_tokenizer(data, folder)
        merges = [m if isinstance(m, str) else " ".join(m) for m in data["model"]["merges"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ZqError(
            f"{folder} has no readable tokenizer.json, which a GGUF file is made from; add it"
        ) from None
    for entry in data.get("added_tokens", ()):
        entries.append((entry["content"], entry["id"], CONTROL if entry["special"] else USER_DEFINED))
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    for text, i, kind in entries:
        if not 0 <= i < config.vocab_size:
            raise ZqError(
                f"the tokenizer in {folder} has the token {text!r} with id {i}, and the model "
                f"{config.vocab_size} of them; use the tokenizer of this very model"
            )
        tokens[i], types[i] = text, kind
    tokenizer = load_tokenizer(folder)
    special = {key: getattr(tokenizer, f"{key}_token_id", None) for key in ("bos", "eos", "pad", "unk")}
    first, template = tokenizer("a").input_ids[:1], tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return Vocabulary(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=merges,
        special={key: i for key, i in special.items() if i is not None},
        add_bos=bool(first) and first[0] == special["bos"],
        template=template,
    )


def _tokenizer(writer: Any, config: Any, folder: Path) -> None:
    found = _vocabulary(config, folder)
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name of byte-level BPE
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    writer.add_token_merges(found.merges)
    for key, i in found.special.items():
        getattr(writer, f"add_{key}_token_id")(i)
    writer.add_add_bos_token(found.add_bos)
    if found.template:
        writer.add_chat_template(found.template)


def _pre_tokenizer(data: dict[str, Any], folder: Path) -> str:
    """llama.cpp's name of how tokenizer.json splits a text into words. Raises ZqError when it has none: every
    setting has to be the one that the name stands for."""
    model, split = data["model"], data.get("pre_tokenizer") or {}
    parts = split.get("pretokenizers", [split])
    kinds = tuple(part.get("type") for part in parts)
    normalizer = (data.get("normalizer") or {}).get("type")
    name = None
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        last, first = parts[-1], parts[0]
        spaced, words = last.get("add_prefix_space"), last.get("use_regex", True)
        pattern = (first.get("pattern") or {}).get("Regex")
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if kinds == ("ByteLevel",) and words and not spaced:
            name = "gpt-2"
        elif kinds == ("Digits", "ByteLevel") and first.get("individual_digits") and words and not spaced:
            name = "smollm"
        elif kinds == ("Split", "ByteLevel") and isolated and not words and not spaced:
            name = PATTERNS.get(str(pattern))
    fits = normalizer is None or (normalizer, name) == ("NFC", "qwen2")
    if name and fits and bool(model.get("ignore_merges")) == (name == "llama-bpe"):
        return name
    raise ZqError(
        f"the tokenizer in {folder} is of a kind that zq cannot describe to llama.cpp ({model.get('type')}, "
        f"{', '.join(map(str, kinds))}); use another format"
    )
