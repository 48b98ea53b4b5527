from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from zq.checkpoint.index import INDEX, read_index
from zq.checkpoint.reader import reader, same_tensor
from zq.errors import ZqError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.randn(64, 64), "b": torch.randn(8).bfloat16()}, tmp_path / "one.safetensors")
    save_file({"c": torch.arange(6).reshape(2, 3)}, tmp_path / "two.safetensors")
    weight_map = {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_values_are_those_of_safetensors(folder: Path) -> None:
    read = reader(read_index(folder))
    expected = load_file(folder / "one.safetensors") | load_file(folder / "two.safetensors")
    got = read(["c", "a", "b"])
    assert set(got) == {"a", "b", "c"}
    assert all(torch.equal(got[name], expected[name]) for name in got)
    assert all(got[name].dtype == expected[name].dtype for name in got)
    assert read([]) == {}
    assert set(read(name for name in ("a", "c"))) == {"a", "c"}


def test_nothing_stays_mapped_and_the_copies_are_ones_own(folder: Path) -> None:
    read = reader(read_index(folder))
    tensors = read(["a", "c"])
    mapped = Path("/proc/self/maps").read_text()
    assert str(folder / "one.safetensors") not in mapped
    before = (folder / "one.safetensors").read_bytes()
    tensors["a"].zero_()
    assert (folder / "one.safetensors").read_bytes() == before
    assert read(["a"])["a"].any()
    (folder / "one.safetensors").write_bytes(bytes(10))
    assert torch.equal(tensors["c"], torch.arange(6).reshape(2, 3))


def test_an_unknown_name_is_refused(folder: Path) -> None:
    with pytest.raises(ZqError, match="holds no tensor 'd'"):
        reader(read_index(folder))(["a", "d"])


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_two_tensors_are_compared_to_the_last_byte(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zq.checkpoint.reader.CHUNK", chunk)
    a = torch.randn(7, 5).bfloat16()
    last = a.clone()
    last[-1, -1] += 1
    others = {"same": a.clone(), "last": last, "flat": a.reshape(-1).clone(), "half": a.half()}
    edges = {"s": torch.tensor(1.0), "t": torch.tensor(1.0), "e": torch.zeros(0, 3), "f": torch.zeros(0, 3)}
    save_file({"a": a, **others, **edges}, tmp_path / "model.safetensors")
    index = read_index(tmp_path)
    assert [name for name in others if same_tensor(index, "a", name)] == ["same"]
    assert same_tensor(index, "s", "t")
    assert same_tensor(index, "e", "f")
