"""Cubins appear whole or not at all, and never stale."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from zq.errors import ZqError
from zq.kernels import cache as cubin_cache
from zq.kernels import nvrtc
from zq.kernels.table import UNITS

UNIT = UNITS["plain_fp8_fp32"]


def test_compiled_once(cache, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    first = cubin_cache.compiled(UNIT, "sm_90a")
    path = cubin_cache.place(UNIT, "sm_90a")
    assert path.parent == cache / "kernels"
    assert path.read_bytes() == first

    def refuse(*args: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(nvrtc, "compile_unit", refuse)
    assert cubin_cache.compiled(UNIT, "sm_90a") == first
    with pytest.raises(AssertionError, match="compiled again"):
        cubin_cache.compiled(UNIT, "sm_89")


def test_a_failure_keeps_the_log_and_no_cubin(tmp_path, monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    monkeypatch.setenv("ZQ_CACHE", str(tmp_path))
    with pytest.raises(ZqError, match=r"does not compile for sm_90a .*the whole log is in") as raised:
        cubin_cache.compiled(replace(UNIT, defines=()), "sm_90a")
    (left,) = (tmp_path / "kernels").iterdir()
    assert str(left) in str(raised.value)
    assert "error" in left.read_text()


def test_writers_at_once_leave_one_whole_file(tmp_path):
    path = tmp_path / "a" / "file"
    texts = [bytes([i]) * 100_000 for i in range(16)]
    seen = []

    def one(text: bytes) -> None:
        cubin_cache.write(path, text)
        seen.append(path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, texts))
    assert all(text in texts for text in seen)
    assert os.listdir(path.parent) == ["file"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "file"
    cubin_cache.write(path, b"old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ZqError, match="No space left on device; make room"):
        cubin_cache.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZqError, match=r"Not a directory|File exists"):
        cubin_cache.write(Path(tmp_path / "file" / "x"), b"")
