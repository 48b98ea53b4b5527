"""Compiled cubins by what they are made of.

The cache is `$ZQ_CACHE/kernels` (`~/.cache/zq/kernels`). A file is named after the unit, the architecture and
the hash of everything that it depends on (`nvrtc.key`), so it never goes stale, and appears there by a
rename, so it is never half there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from zq.demo import cache_dir
from zq.errors import ZqError
from zq.kernels import nvrtc
from zq.kernels.unit import Unit


def compiled(unit: Unit, arch: str) -> bytes:
    """The cubin of a unit, compiled when it is not in the cache. Raises ZqError."""
    path = place(unit, arch)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _unusable(path, error) from None
    try:
        made = nvrtc.compile_unit(unit, arch).cubin
    except nvrtc.CompileError as error:
        log = folder() / f"{unit.name}.{arch}.log"
        write(log, error.log.encode())
        raise ZqError(f"{error}; the whole log is in {log}") from None
    write(path, made)
    return made


def folder() -> Path:
    """Where cubins are cached."""
    return cache_dir() / "kernels"


def place(unit: Unit, arch: str) -> Path:
    """Where the cache keeps a cubin. Raises ZqError when NVRTC, whose version is part of it, is missing."""
    return folder() / f"{unit.name}.{arch}.{nvrtc.key(unit, arch, nvrtc.version())[:32]}.cubin"


def write(path: Path, data: bytes) -> None:
    """Write a file so that others see all of it or nothing. Raises ZqError."""
    make_folder(path.parent)
    try:
        handle, fresh = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.chmod(fresh, 0o644)  # a temporary file is its owner's alone; a cache may be shared
            os.replace(fresh, path)
        except BaseException:
            os.unlink(fresh)
            raise
    except OSError as error:
        raise _unusable(path, error) from None


def make_folder(path: Path) -> None:
    """Raises ZqError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> ZqError:
    return ZqError(
        f"{path} cannot be written or read: {error.strerror or error}; make room or choose another folder "
        "(ZQ_CACHE, if it lies in the cache)"
    )
