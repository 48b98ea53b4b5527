"""Reading headers: every way in which a folder is not a usable checkpoint."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from zq.checkpoint.index import INDEX, SINGLE, main_dtype, read_header, read_index
from zq.errors import ZqError


def sharded(root: Path, weight_map: dict | None = None) -> Path:
    """Two shards, one tensor each, and an index."""
    save_file({"a": torch.ones(2, 3)}, root / "one.safetensors")
    save_file({"b": torch.zeros(4).bfloat16()}, root / "two.safetensors")
    entries = {"a": "one.safetensors", "b": "two.safetensors"} if weight_map is None else weight_map
    (root / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": entries}))
    (root / "config.json").write_text("{}")
    return root


def refused(root: Path, *words: str) -> None:
    with pytest.raises(ZqError) as caught:
        read_index(root)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_shards_and_single_files(tmp_path: Path) -> None:
    index = read_index(sharded(tmp_path))
    assert index.shapes == {"a": (2, 3), "b": (4,)}
    assert (index.tensors["a"].dtype, index.tensors["b"].dtype) == ("F32", "BF16")
    assert index.nbytes == 24 + 8
    assert [f.name for f in index.files()] == ["one.safetensors", "two.safetensors"]
    single = tmp_path / "single"
    single.mkdir()
    save_file({"x": torch.ones(1)}, single / SINGLE)
    assert read_index(single).shapes == {"x": (1,)}


def test_a_missing_shard(tmp_path: Path) -> None:
    (sharded(tmp_path) / "two.safetensors").unlink()
    refused(tmp_path, "two.safetensors is missing", "download")


def test_a_truncated_shard(tmp_path: Path) -> None:
    file = sharded(tmp_path) / "one.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(tmp_path, "one.safetensors is not a readable safetensors file")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"junk",
        b"<html>not found</html>" * 9,
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 8) + b'{"a": 1}',
    ],
    ids=["empty", "short", "html", "huge header", "absurd header", "no object", "no entry"],
)
def test_junk(tmp_path: Path, content: bytes) -> None:
    (sharded(tmp_path) / "one.safetensors").write_bytes(content)
    refused(tmp_path, "one.safetensors is not a readable safetensors file", "download it again")


def test_offsets_that_overlap_or_leave_the_file(tmp_path: Path) -> None:
    for offsets in ([0, 400], [4, 28], [-8, 16]):
        text = json.dumps({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": offsets}}).encode()
        content = struct.pack("<Q", len(text)) + text + bytes(24)
        (sharded(tmp_path) / "one.safetensors").write_bytes(content)
        refused(tmp_path, "one.safetensors")


@pytest.mark.parametrize("file", ["../one.safetensors", "/etc/passwd", "sub/one.safetensors", "..", ".", ""])
def test_entries_that_leave_the_folder(tmp_path: Path, file: str) -> None:
    refused(sharded(tmp_path, {"a": file}), "outside the checkpoint folder", "do not trust")


def test_a_shard_that_does_not_hold_what_the_index_says(tmp_path: Path) -> None:
    refused(sharded(tmp_path, {"a": "one.safetensors", "c": "two.safetensors"}), "1 tensors", "'c'")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"metadata": {}}', "\xff"])
def test_a_broken_index(tmp_path: Path, text: str) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(text.encode("latin-1"))
    refused(tmp_path, "is not a shard index")


def test_an_index_beside_a_single_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, sharded(tmp_path) / SINGLE)
    refused(tmp_path, SINGLE, INDEX, "delete the one")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert read_index(tmp_path).shapes == {"a": (2, 3)}, "an index of the single file itself"


def test_no_weights_and_only_pickled_weights(tmp_path: Path) -> None:
    refused(tmp_path, "holds no weights", SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    refused(tmp_path, "pytorch_model.bin", "only safetensors", "save_pretrained")


def test_a_tensor_counts_where_the_index_puts_it(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"a": torch.zeros(9), "b": torch.zeros(4).bfloat16()}, tmp_path / "two.safetensors")
    assert read_index(tmp_path).shapes == {"a": (2, 3), "b": (4,)}


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    save_file({"s": torch.tensor(1.0), "e": torch.zeros(0, 3)}, tmp_path / SINGLE)
    infos = {i.name: i for i in read_header(tmp_path / SINGLE)}
    assert (infos["s"].shape, infos["s"].nbytes) == ((), 4)
    assert (infos["e"].shape, infos["e"].nbytes) == ((0, 3), 0)


def test_the_main_dtype_is_that_of_most_values(tmp_path: Path) -> None:
    save_file(
        {"w": torch.zeros(9, 9).half(), "n": torch.zeros(9), "i": torch.zeros(999).int()}, tmp_path / SINGLE
    )
    assert main_dtype(read_index(tmp_path)) == torch.float16
    assert main_dtype(read_index(tmp_path), {"w"}) == torch.float32
    save_file({"w": torch.zeros(9, 9).to(torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(ZqError, match="F8_E4M3 tensors; zq works on BF16, F16 and F32"):
        main_dtype(read_index(tmp_path))


def test_the_fingerprint_changes_with_config_content_and_layout(tmp_path: Path) -> None:
    first = read_index(sharded(tmp_path)).fingerprint()
    assert read_index(tmp_path).fingerprint() == first
    (tmp_path / "config.json").write_text("{ }")
    second = read_index(tmp_path).fingerprint()
    save_file({"a": torch.ones(2, 3) * 2}, tmp_path / "one.safetensors")
    third = read_index(tmp_path).fingerprint()
    assert len({first, second, third}) == 3
