"""Shards whose layout is fixed first, filled in any order, visible last."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from zq.checkpoint.index import INDEX, SINGLE, SIZES, read_index
from zq.checkpoint.writer import CODES, Shard, ShardWriter, Slot, plan_shards, write_atomic
from zq.errors import OutputError, ZqError

DTYPES = {code: dtype for dtype, code in CODES.items()}


def tensors_of(seed: int = 0, count: int = 12) -> dict[str, torch.Tensor]:
    """Every dtype, odd sizes, a scalar and an empty tensor."""
    generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
    result: dict[str, torch.Tensor] = {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3)}
    for i, dtype in zip(range(count), itertools.cycle(CODES), strict=False):
        shape = (draw.randint(1, 5), draw.choice([1, 3, 7]))
        values = torch.randint(0, 2, shape, generator=generator)
        result[f"t{i}.weight"] = values.to(dtype)
    return result


def slots_of(tensors: dict[str, torch.Tensor]) -> list[Slot]:
    return [Slot(name, CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()]


def write_all(folder: Path, tensors: dict[str, torch.Tensor], max_bytes: int, order: list[str]) -> list[Path]:
    writer = ShardWriter(folder / ".tmp", plan_shards(slots_of(tensors), max_bytes))
    writer.create()
    for name in order:
        writer.write({name: tensors[name]})
    return writer.publish(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


@pytest.mark.parametrize("max_bytes", [1, 40, 10**9])
def test_safetensors_reads_back_every_dtype(tmp_path: Path, max_bytes: int) -> None:
    tensors = tensors_of()
    done = write_all(tmp_path, tensors, max_bytes, list(tensors))
    loaded: dict[str, torch.Tensor] = {}
    for file in done:
        if file.suffix == ".safetensors":
            loaded |= load_file(file)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert read_index(tmp_path).shapes == {n: tuple(t.shape) for n, t in tensors.items()}
    assert (tmp_path / INDEX).exists() == (max_bytes < 10**9)
    if max_bytes < 10**9:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert done[-1].name == INDEX


def test_bytes_do_not_depend_on_the_order_or_on_writing_twice(tmp_path: Path) -> None:
    tensors = tensors_of(1)
    names = list(tensors)
    for i, order in enumerate([names, names[::-1], names[::-1] + names]):
        (tmp_path / str(i)).mkdir()
        write_all(tmp_path / str(i), tensors, 50, order)
    assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")


slots = st.builds(
    lambda i, code, shape: Slot(f"n{i}", code, tuple(shape)),
    st.integers(0, 10**6),
    st.sampled_from(list(SIZES)),
    st.lists(st.integers(1, 9), max_size=3),
)


@given(st.lists(slots, min_size=1, max_size=20, unique_by=lambda s: s.name), st.integers(1, 500))
def test_plans_are_aligned_whole_and_within_the_limit(planned: list[Slot], limit: int) -> None:
    shards = plan_shards(planned, limit)
    assert sorted(s.name for shard in shards for s in shard.slots) == sorted(s.name for s in planned)
    for number, shard in enumerate(shards):
        header = shard.header()
        assert len(header) % 8 == 0
        assert struct.unpack("<Q", header[:8])[0] == len(header) - 8
        entries = json.loads(header[8:])
        assert entries.pop("__metadata__") == {"format": "pt"}
        end = 0
        for slot in shard.slots:
            start, stop = entries[slot.name]["data_offsets"]
            assert (start, stop - start) == (end, slot.nbytes)
            assert (len(header) + start) % SIZES[slot.dtype] == 0
            end = stop
        assert end <= limit or len(shard.slots) == 1
        one = SINGLE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        assert shard.file == one


def test_hashes_are_of_the_bytes(tmp_path: Path) -> None:
    x = torch.randn(4, 6)
    writer = ShardWriter(tmp_path, plan_shards(slots_of({"x": x, "y": x.T.contiguous()}), 10**9))
    writer.create()
    hashes = writer.write({"x": x, "y": x.T})  # a view is written in row-major order
    assert hashes["x"] == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert hashes["y"] == hashlib.sha256(x.T.contiguous().numpy().tobytes()).hexdigest()
    assert writer.nbytes == (tmp_path / SINGLE).stat().st_size


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"z": torch.zeros(2)}, "'z' is not in the plan"),
        ({"x": torch.zeros(3)}, r"'x' is F32 \(3,\) but the plan promised F32 \(2,\)"),
        ({"x": torch.zeros(2).half()}, r"'x' is F16 \(2,\) but the plan promised F32"),
    ],
)
def test_what_was_not_planned_is_refused(tmp_path: Path, tensors: dict, words: str) -> None:
    writer = ShardWriter(tmp_path, plan_shards([Slot("x", "F32", (2,))], 10**9))
    writer.create()
    with pytest.raises(ZqError, match=words):
        writer.write(tensors)


def test_nothing_looks_complete_when_publishing_fails_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = tensors_of(2)
    writer = ShardWriter(tmp_path / ".tmp", plan_shards(slots_of(tensors), 30))
    writer.create()
    writer.write(tensors)
    real, calls = os.replace, []

    def fail_after(allowed: int):
        def replace(source, target):
            calls.append(target)
            if len(calls) > allowed:
                raise KeyboardInterrupt
            real(source, target)

        return replace

    shards = len(writer.shards)
    assert shards > 2
    for allowed in (0, 1, shards):
        calls.clear()
        monkeypatch.setattr(os, "replace", fail_after(allowed))
        with pytest.raises(KeyboardInterrupt):
            writer.publish(tmp_path)
        monkeypatch.setattr(os, "replace", real)
        assert not (tmp_path / INDEX).exists()
        with pytest.raises(ZqError):
            read_index(tmp_path)
        writer.recall(tmp_path)
        assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".safetensors") == []
    writer.publish(tmp_path)
    assert read_index(tmp_path).shapes.keys() == tensors.keys()
    writer.recall(tmp_path)  # also a publication that was complete
    assert not list(tmp_path.glob("model*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_found_before_the_first_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def full(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full)
    writer = ShardWriter(tmp_path, [Shard("model.safetensors", (Slot("x", "F32", (2,)),))])
    with pytest.raises(OutputError, match=r"no space left for .*model\.safetensors .* free the space"):
        writer.create()


def test_a_file_size_limit_of_the_system(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
from zq.checkpoint.writer import ShardWriter, Slot, plan_shards
from zq.errors import OutputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    ShardWriter(Path(sys.argv[1]), plan_shards([Slot("x", "F32", (4096,))], 10**9)).create()
except OutputError as error:
    print(error)
"""
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert out.stdout.startswith("no space left for")


def test_a_folder_that_vanished(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "gone", plan_shards([Slot("x", "F32", (2,))], 10**9))
    with pytest.raises(OutputError, match=r"cannot write .* No such file"):
        writer.write({"x": torch.zeros(2)})
    with pytest.raises(OutputError, match="cannot write"):
        write_atomic(tmp_path / "gone" / "a.json", "{}")


def test_write_atomic_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_atomic(path, "old")

    def fail(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match="no space left"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"
