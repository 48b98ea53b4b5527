"""What a safetensors checkpoint holds, read from headers only: name -> file, dtype, shape.

Every shard is opened once, so a missing, truncated or foreign file is found before any work.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from zq.errors import ZqError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FLOATS = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
COMPUTE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SIZES = {**FLOATS, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
SIZES |= {"U64": 8, "U32": 4, "U16": 2}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint; `dtype` is the safetensors code, for example "BF16"."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * SIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class CheckpointIndex:
    root: Path
    tensors: dict[str, TensorInfo]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def identity(self) -> str:
        """sha256 over config.json and every header entry: the same wherever the checkpoint was copied to."""
        digest = hashlib.sha256((self.root / "config.json").read_bytes())
        for info in sorted(self.tensors.values(), key=lambda t: t.name):
            digest.update(f"{info.name}|{info.file.name}|{info.dtype}|{info.shape}\n".encode())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256 over the identity, and every file's size and modification time.

        It answers "is this still the checkpoint the job began with?" without reading the weights.
        """
        digest = hashlib.sha256(self.identity().encode())
        for file in self.files():
            stat = file.stat()
            digest.update(f"{file.name}|{stat.st_size}|{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def read_index(root: Path) -> CheckpointIndex:
    """Reads the headers of the checkpoint in folder `root`. Raises ZqError for anything unusable."""
    expected = _weight_map(root)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(expected.values())) if expected else [root / SINGLE]:
        for info in read_header(file):
            if expected and expected.get(info.name) != file:
                continue
            tensors[info.name] = info
    missing = sorted(set(expected) - set(tensors))
    if missing:
        raise ZqError(
            f"{root / INDEX} promises {len(missing)} tensors that its shards do not hold, first "
            f"'{missing[0]}'; download the checkpoint again"
        )
    return CheckpointIndex(root, tensors)


def read_header(file: Path) -> list[TensorInfo]:
    """The entries of one safetensors file. Raises ZqError when it is missing, truncated or no such file."""
    if not file.is_file():
        raise ZqError(f"shard {file} is missing; download the checkpoint again")
    try:
        with safe_open(file, framework="pt") as shard:
            entries = []
            for name in shard.keys():  # noqa: SIM118 (safe_open is not a mapping)
                part = shard.get_slice(name)
                entries.append(TensorInfo(name, file, part.get_dtype(), tuple(part.get_shape())))
            return entries
    except (SafetensorError, OSError) as error:
        raise ZqError(
            f"{file} is not a readable safetensors file ({error}); download it again or convert it anew"
        ) from None


def main_dtype(index: CheckpointIndex, leave_out: Container[str] = ()) -> torch.dtype:
    """The floating dtype of most values: that in which the model computes and scales are stored.

    leave_out: names of tensors that do not count (scales, which may have a dtype of their own).
    Raises ZqError when the checkpoint holds no BF16, F16 or F32 weights to speak of.
    """
    counts: Counter[str] = Counter()
    for info in index.tensors.values():
        if info.dtype in FLOATS and info.name not in leave_out:
            counts[info.dtype] += info.numel
    code = counts.most_common(1)[0][0] if counts else None
    if code not in COMPUTE:
        found = sorted({info.dtype for info in index.tensors.values()})
        raise ZqError(
            f"{index.root} holds {', '.join(found) or 'no'} tensors; zq works on BF16, F16 and F32; "
            "save the model in one of these first"
        )
    return COMPUTE[code]


def _weight_map(root: Path) -> dict[str, Path]:
    """tensor -> file from the index, or {} for a single-file checkpoint."""
    path = root / INDEX
    if not path.is_file():
        if (root / SINGLE).is_file():
            return {}
        pickled = sorted(p.name for p in root.glob("*.bin")) or sorted(p.name for p in root.glob("*.pt*"))
        if pickled:
            raise ZqError(
                f"{root} holds {pickled[0]} but no safetensors, and zq reads only safetensors; convert it: "
                f'python -c "from transformers import AutoModelForCausalLM as A; '
                f"A.from_pretrained('{root}').save_pretrained('{root}-safetensors')\""
            )
        raise ZqError(f"{root} holds no weights: expected {SINGLE} or {INDEX}; is this a model folder?")
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ZqError(f"{path} is not a shard index ({error!r}); download it again") from None
    if (root / SINGLE).is_file() and set(entries.values()) != {SINGLE}:
        raise ZqError(
            f"{root} holds both {SINGLE} and {INDEX}, and readers differ in which they take; delete the one "
            "that is not meant"
        )
    for name, file in entries.items():
        if Path(file).name != file or file in ("", ".", ".."):
            raise ZqError(
                f"{path} sends '{name}' to '{file}', outside the checkpoint folder; only plain file names "
                "are allowed: do not trust this checkpoint"
            )
    return {name: root / file for name, file in entries.items()}
