"""Writes safetensors shards whose layout is known before the first tensor exists.

The plan fixes every output name, dtype and shape, so the header of each shard is written and its space
reserved first (a full disk is found at once); each tensor then goes to its own place as soon as it is
done. Nothing is buffered, a resumed run writes the same bytes to the same places, and the result is
independent of the order of writing. Shards carry a temporary folder's path until `publish` renames
them; the index file comes last, so a killed run never leaves something that looks complete.

Format: 8 bytes little-endian header length, JSON header padded with spaces to a multiple of 8, data.
https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zq.checkpoint.index import INDEX, SINGLE, SIZES
from zq.errors import OutputError, ZqError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Slot:
    """One tensor of the output: its name, safetensors dtype code and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * SIZES[self.dtype]


@dataclass(frozen=True)
class Shard:
    file: str
    slots: tuple[Slot, ...]

    def header(self) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for slot in self.slots:
            end = offset + slot.nbytes
            entries[slot.name] = {
                "dtype": slot.dtype,
                "shape": list(slot.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text


def plan_shards(slots: Sequence[Slot], max_bytes: int) -> list[Shard]:
    """Slots in order, a new shard whenever the next tensor would exceed `max_bytes`.

    Inside a shard the tensors with the widest elements come first: data must start aligned.
    """
    groups: list[list[Slot]] = [[]]
    size = 0
    for slot in slots:
        if groups[-1] and size + slot.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(slot)
        size += slot.nbytes
    names = (
        [SINGLE]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    ordered = [sorted(g, key=lambda s: (-SIZES[s.dtype], s.name)) for g in groups]
    return [Shard(name, tuple(group)) for name, group in zip(names, ordered, strict=True)]


class ShardWriter:
    """Fills the shards under `folder`; `publish` moves them to their final place."""

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.shards = list(shards)
        self._where: dict[str, tuple[Path, int, Slot]] = {}
        for shard in self.shards:
            position = len(shard.header())
            for slot in shard.slots:
                self._where[slot.name] = (folder / shard.file, position, slot)
                position += slot.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, headers included."""
        return sum(len(s.header()) + sum(t.nbytes for t in s.slots) for s in self.shards)

    def create(self) -> None:
        """Write the headers and reserve the space. Raises ZqError when the disk is full."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for shard in self.shards:
            header = shard.header()
            size = len(header) + sum(slot.nbytes for slot in shard.slots)
            try:
                with open(self.folder / shard.file, "wb") as out:
                    out.write(header)
                    out.flush()
                    os.posix_fallocate(out.fileno(), 0, size)
                    os.fsync(out.fileno())
            except OSError as error:
                raise disk_error(error, self.folder / shard.file, size) from None

    def write(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
        """Write whole tensors in place and return the sha256 of each; they are on disk on return.

        Raises ZqError for a name, dtype or shape that the plan did not promise.
        """
        hashes: dict[str, str] = {}
        by_file: dict[Path, list[tuple[int, Slot]]] = {}
        for name in tensors:
            if name not in self._where:
                raise ZqError(f"output tensor '{name}' is not in the plan; this is a defect of zq, report it")
            file, position, slot = self._where[name]
            by_file.setdefault(file, []).append((position, slot))
        for file, places in by_file.items():
            try:
                with open(file, "r+b") as out:
                    for position, slot in sorted(places, key=lambda p: p[0]):
                        data = _bytes(tensors[slot.name], slot)
                        hashes[slot.name] = hashlib.sha256(data).hexdigest()
                        out.seek(position)
                        out.write(data)
                    out.flush()
                    os.fsync(out.fileno())
            except OSError as error:
                raise disk_error(error, file, sum(slot.nbytes for _, slot in places)) from None
        return hashes

    def publish(self, target: Path) -> list[Path]:
        """Rename the shards into `target`, then write the index (several shards only)."""
        done = []
        for shard in self.shards:
            try:
                os.replace(self.folder / shard.file, target / shard.file)
            except OSError as error:
                raise disk_error(error, target / shard.file, 0) from None
            done.append(target / shard.file)
        if len(self.shards) > 1:
            total = sum(slot.nbytes for shard in self.shards for slot in shard.slots)
            weight_map = {slot.name: shard.file for shard in self.shards for slot in shard.slots}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            write_atomic(target / INDEX, json.dumps(index, indent=2) + "\n")
            done.append(target / INDEX)
        sync_folder(target)
        return done

    def recall(self, target: Path) -> None:
        """Take back the index and the shards that an interrupted `publish` had already moved."""
        (target / INDEX).unlink(missing_ok=True)
        for shard in self.shards:
            if (target / shard.file).exists() and not (self.folder / shard.file).exists():
                os.replace(target / shard.file, self.folder / shard.file)


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never half, and that it and all
    renames before it in this folder are durable on return. Raises OutputError."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path, len(text)) from None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _bytes(tensor: torch.Tensor, slot: Slot) -> memoryview:
    code, shape = CODES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    if (code, shape) != (slot.dtype, slot.shape):
        raise ZqError(
            f"output tensor '{slot.name}' is {code} {shape} but the plan promised {slot.dtype} {slot.shape}; "
            "this is a defect of zq, report it"
        )
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def disk_error(error: OSError, file: Path, size: int) -> OutputError:
    """What the user is told when writing `size` bytes to `file` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        needed = f" ({size / 1e6:.1f} MB needed)" if size else ""
        return OutputError(f"no space left for {file}{needed}; free the space or choose another -o")
    return OutputError(f"cannot write {file}: {error.strerror or error}; check the folder given with -o")
