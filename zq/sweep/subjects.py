"""The models of a sweep, their tokens, and the setting: what all figures of one sweep depend on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import zq
from zq.checkpoint.index import main_dtype, read_index
from zq.data import evaluation_windows, load_text
from zq.errors import ZqError
from zq.models.find import find_family, find_positions, load_config, load_tokenizer
from zq.numerics.metrics import tensor_hash
from zq.source import resolve
from zq.sweep.grid import Cell


@dataclass(frozen=True)
class Subject:
    """A model of the sweep. `windows`: token ids, the same for all of its cells; `identity`: of its files and
    these tokens; `bits` of the dtype that most of its values are stored in."""

    name: str
    folder: Path
    identity: str
    windows: list[list[int]]
    bits: int

    @property
    def original(self) -> Cell:
        return Cell(self.name, self.bits)


def subject(name: str, folder: Path, text: str, windows: int, length: int, start: float) -> Subject:
    """Raises ZqError for what cannot be swept: encoders, models without a head or a tokenizer, short
    texts."""
    if find_family(folder).encoder:
        raise ZqError(f"{folder} is an encoder, which predicts no tokens; sweep decoders")
    limit = find_positions(folder) or length
    if length > limit:
        raise ZqError(
            f"--length {length} is more than the {limit} positions of {folder}; give at most {limit}"
        )
    index = read_index(folder)
    config = load_config(folder)
    tokens = evaluation_windows(
        text, load_tokenizer(folder), windows, length, start, vocab_size=config.vocab_size
    )
    digest = hashlib.sha256(f"{index.identity()} {tensor_hash(tokens)}".encode())
    for file in index.files():
        with file.open("rb") as opened:
            while piece := opened.read(1 << 22):
                digest.update(piece)
    return Subject(name, folder, digest.hexdigest(), tokens.tolist(), 8 * main_dtype(index).itemsize)


def subjects(
    models: Sequence[str],
    text: str,
    windows: int,
    length: int,
    start: float,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[list[Subject], dict[str, Any]]:
    """The models, each named by the end of its path where that tells them apart, and the part of the setting
    that says on which tokens they are measured. Raises ZqError."""
    content = load_text(text)
    folders = [resolve(model, progress) for model in models]
    names = [model.rstrip("/").rpartition("/")[2] or model for model in models]
    names = names if len(set(names)) == len(names) else list(models)
    found = [
        subject(name, folder, content, windows, length, start)
        for name, folder in zip(names, folders, strict=True)
    ]
    seen: dict[str, str] = {}
    for each in found:
        if each.identity in seen:
            raise ZqError(f"{seen[each.identity]} and {each.name} are the same model; give each once")
        seen[each.identity] = each.name
    named = Path(text).name if Path(text).is_file() else text
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    tokens = {"windows": windows, "length": length, "start": start}
    return found, {"text": f"{named} sha256:{digest}", **tokens}


def environment(devices: Sequence[str]) -> dict[str, Any]:
    """The part of the setting that says where: kind of device and versions. Raises ZqError when the devices
    differ in kind."""
    kinds = {"cpu" if name == "cpu" else torch.cuda.get_device_name(name) for name in devices}
    if len(kinds) > 1:
        raise ZqError(
            f"--devices: {' and '.join(sorted(kinds))} give different figures; take devices of one kind"
        )
    return {
        "device": kinds.pop(),
        "zq": zq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
