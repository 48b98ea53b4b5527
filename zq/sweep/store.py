"""results.jsonl: one line per finished cell, appended in one write and synced; nothing is ever rewritten.

A line has a `key`, which says what it was measured on and how; a cell whose key is there is not measured
again. A kill while a line is written leaves a torn last one, which is cut off when the file is opened next.
All lines of a file share one `setting` (text, windows, device, versions): others would not stand in one
table.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from zq.checkpoint.writer import disk_error
from zq.errors import ZqError

FILE = "results.jsonl"
Row = dict[str, Any]


def key_of(*parts: Any) -> str:
    """sha256 of the parts as canonical JSON: the first 32 hex digits."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def read_rows(out: Path) -> tuple[list[Row], int]:
    """(rows, bytes of the file that hold them) of the sweep in `out`; none where nothing was begun.

    What follows the last line break is a line that was never finished. Raises ZqError for a damaged line, and
    for a folder of something else.
    """
    path = out / FILE
    try:
        if out.exists() and not out.is_dir():
            raise ZqError(f"output {out} is a file; give a folder with -o")
        if not path.exists():
            if out.is_dir() and any(out.iterdir()):
                raise ZqError(f"output {out} is not empty and holds no sweep; choose another -o or delete it")
            return [], 0
        data = path.read_bytes()
    except OSError as error:
        raise ZqError(f"cannot use output {out}: {error.strerror}; choose another -o") from None
    whole = data[: data.rfind(b"\n") + 1]
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            if not {"key", "setting", "cell"} <= set(row):
                raise ValueError("not a row")
        except (ValueError, TypeError):
            raise ZqError(f"{path} line {number} is damaged; delete that line and sweep again") from None
        rows.append(row)
    return rows, len(whole)


def check_setting(rows: list[Row], setting: dict[str, Any], out: Path) -> None:
    """Raises ZqError when `rows` were measured in another way than `setting`."""
    for row in rows:
        before = row["setting"]
        for name in sorted(set(before) | set(setting)):
            if before.get(name) != setting.get(name):
                raise ZqError(
                    f"the sweep in {out} was measured with {name} {before.get(name)}, this one has "
                    f"{setting.get(name)}: figures of both cannot stand in one table; use the same, or "
                    "another -o"
                )


class Store:
    """The file, held open and locked by one process. `torn`: bytes that were cut off."""

    def __init__(self, out: Path) -> None:
        """Raises ZqError when `out` cannot be used or another zq sweeps there."""
        read_rows(out)
        self._made = [folder for folder in (out, *out.parents) if not folder.exists()]  # deepest first
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(out / FILE, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ZqError(
                f"cannot create {out / FILE}: {error.strerror}; choose a writable folder with -o"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a disk without locks
                os.close(self._handle)
                raise ZqError(f"another zq is sweeping in {out}; wait for it, or choose another -o") from None
        self.rows, length = read_rows(out)
        self.path = out / FILE
        self.torn = os.fstat(self._handle).st_size - length
        if self.torn:
            os.ftruncate(self._handle, length)

    @property
    def keys(self) -> set[str]:
        return {row["key"] for row in self.rows}

    def add(self, row: Row) -> None:
        """On disk, whole, when this returns. Raises OutputError (disk)."""
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._handle, line) :]
            os.fsync(self._handle)
        except OSError as error:
            raise disk_error(error, self.path, len(line)) from None
        self.rows.append(row)

    def close(self) -> None:
        """Let another process sweep here. What holds no row is removed, and the folders that were made for
        it."""
        if not self.rows:
            self.path.unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                for folder in self._made:
                    folder.rmdir()
        os.close(self._handle)
