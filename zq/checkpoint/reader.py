"""Reads named tensors; nothing stays mapped afterwards, so memory is what the caller holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from zq.checkpoint.index import CheckpointIndex, TensorInfo
from zq.errors import ZqError

Read = Callable[[Iterable[str]], dict[str, torch.Tensor]]
CHUNK = 64 << 20  # bytes


def reader(index: CheckpointIndex, device: str | torch.device = "cpu") -> Read:
    """A function from tensor names to tensors on `device`.

    Each call opens the files it needs, copies the tensors out and closes them: the pages of a mapped
    file count as resident memory for as long as it is open. Raises ZqError for an unknown name.
    """

    def read(names: Iterable[str]) -> dict[str, torch.Tensor]:
        by_file: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name not in index.tensors:
                raise ZqError(f"{index.root} holds no tensor '{name}'; is it the checkpoint of this config?")
            by_file[index.tensors[name].file].append(name)
        tensors: dict[str, torch.Tensor] = {}
        for file, wanted in by_file.items():
            with safe_open(file, framework="pt") as shard:
                for name in wanted:
                    mapped = shard.get_tensor(name)
                    tensors[name] = mapped.clone() if str(device) == "cpu" else mapped.to(device)
                    del mapped
        return tensors

    return read


def same_tensor(index: CheckpointIndex, a: str, b: str) -> bool:
    """Whether two tensors of a checkpoint agree in dtype, shape and every byte; read CHUNK at a time."""
    first, second = index.tensors[a], index.tensors[b]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if not first.shape or not first.nbytes:
        read = reader(index)
        return torch.equal(read([a])[a], read([b])[b])
    rows = max(1, CHUNK * first.shape[0] // first.nbytes)
    return all(
        torch.equal(_rows(first, start, start + rows), _rows(second, start, start + rows))
        for start in range(0, first.shape[0], rows)
    )


def _rows(info: TensorInfo, start: int, stop: int) -> torch.Tensor:
    """The bytes of some rows; the file is closed again, as in `reader`."""
    with safe_open(info.file, framework="pt") as shard:
        return shard.get_slice(info.name)[start:stop].contiguous().view(torch.uint8).clone()
