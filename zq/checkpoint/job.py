"""A resumable run as a folder: what was asked, which blocks are done, and the live activations.

    OUT/.zq-job/job.json              fingerprint and one report per finished unit
    OUT/.zq-job/carry-<unit>.safetensors   activations that enter the next block, saved verbatim:
                                      recomputing them would not give the same bits
    OUT/.zq-job/<name>.safetensors    what a run made once and needs again (`keep`)
    OUT/.zq-job/shards/               output shards, partly filled
    OUT/.zq-job/lock                  held while a process works here; the kernel frees it when it dies

`commit` is the only step that counts: it replaces job.json atomically after everything the unit wrote
is on disk, so a kill at any moment repeats at most the units since the last commit.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from zq.checkpoint.writer import CODES, Shard, ShardWriter, Slot, disk_error, write_atomic
from zq.errors import OutputError, ZqError

FOLDER = ".zq-job"
STATE = "job.json"
LOCK = "lock"


class Job:
    """`fingerprint` maps what must not change (model, recipe, version, ...) to a value as text."""

    def __init__(self, out: Path, fingerprint: dict[str, str]) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.shards = self.folder / "shards"
        self.fingerprint = fingerprint
        self.done: dict[str, dict[str, Any]] = {}
        self.remembered: dict[str, str] = {}  # the fingerprint that a resumed job was begun with
        self._carry: str | None = None
        self._lock: int | None = None
        self._made = [out]  # deepest first

    @classmethod
    def begin(cls, out: Path, fingerprint: dict[str, str]) -> Job:
        """A fresh job in `out`, which must be new or empty. Raises ZqError otherwise, also when another
        process works there."""
        check_output(out)
        job = cls(out, fingerprint)
        job._made = [folder for folder in (out, *out.parents) if not folder.exists()] or job._made
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZqError(
                f"cannot create {job.folder}: {error.strerror}; choose a writable folder with -o"
            ) from None
        try:
            job._hold()
            job._save()
        except OutputError:  # and not when another process holds it: then nothing here is ours
            job.discard()
            raise
        return job

    @classmethod
    def resume(cls, out: Path, fingerprint: dict[str, str]) -> Job:
        """Continue the job in `out`. Raises ZqError when there is none or it was begun differently."""
        path = out / FOLDER / STATE
        if not path.is_file():
            raise ZqError(f"{out} holds no interrupted job to resume; run without --resume")
        job = cls(out, fingerprint)
        job._hold()
        try:
            job._recall(path)
        except ZqError:
            job.release()
            raise
        return job

    def _recall(self, path: Path) -> None:
        out = self.out
        try:
            state = json.loads(path.read_text())
            old, done, carry = dict(state["fingerprint"]), state["done"], state["carry"]
            if carry and not (out / FOLDER / carry).is_file():
                raise ValueError(f"{carry} is missing")
        except (ValueError, KeyError, TypeError) as error:
            raise ZqError(f"{path} is damaged ({error!r}); delete {out} and run without --resume") from None
        changed = [key for key, value in self.fingerprint.items() if old.get(key) != value]
        if changed:
            raise ZqError(
                f"the job in {out} was begun with another {' and '.join(changed)}; resume with what it was "
                f"begun with, or delete {out / FOLDER} and start anew"
            )
        self.done, self._carry, self.remembered = done, carry, old

    def commit(
        self,
        unit: str,
        report: dict[str, Any],
        carry: dict[str, torch.Tensor] | None = None,
        *,
        lazily: bool = False,
    ) -> None:
        """Mark `unit` as done; `carry` replaces the carried activations when given. `lazily` leaves the disk
        as it is: until the next commit that is not lazy, a resumed run does the unit again."""
        if lazily:
            self.done[unit] = report
            return
        previous = self._carry
        if carry is not None:
            self._carry = f"carry-{len(self.done):05d}.safetensors"
            _save_tensors(self.folder / self._carry, carry)
        self.done[unit] = report
        self._save()
        if previous is not None and previous != self._carry:
            (self.folder / previous).unlink(missing_ok=True)

    def keep(self, name: str, tensor: torch.Tensor) -> None:
        """Save a tensor that a resumed run must not make again. Raises OutputError."""
        _save_tensors(self.folder / f"{name}.safetensors", {name: tensor})

    def kept(self, name: str) -> torch.Tensor | None:
        """What `keep` saved under this name, or None."""
        file = self.folder / f"{name}.safetensors"
        return load_file(file)[name] if file.is_file() else None

    def carried(self) -> dict[str, torch.Tensor]:
        """The activations saved by the last commit that had any."""
        return load_file(self.folder / self._carry) if self._carry else {}

    def finish(self) -> None:
        """Remove the job folder: the output is complete. Its state goes first, so that a kill in between
        does not leave what looks like a job."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def discard(self) -> None:
        """Undo everything: the job folder, and the folders that `begin` made if nothing else is in them."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # not empty: somebody else's now
            for folder in self._made:
                folder.rmdir()
        self.release()

    def release(self) -> None:
        """Let another process work here. A job that is gone has been released."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    __del__ = release

    def _hold(self) -> None:
        """Lock the folder for this job. Raises ZqError when another has it."""
        try:
            self._lock = _locked(self.folder)
        except OSError as error:
            if error.errno != errno.EWOULDBLOCK:
                raise disk_error(error, self.folder / LOCK, 0) from None
            raise _occupied(self.out) from None

    def _save(self) -> None:
        state = {"fingerprint": self.fingerprint, "carry": self._carry, "done": self.done}
        write_atomic(self.folder / STATE, json.dumps(state, indent=1, allow_nan=False) + "\n")


def _save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file: on disk, whole, when this returns. Raises OutputError."""
    slots = tuple(Slot(name, CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    temporary = ShardWriter(file.parent, [Shard(file.name + ".tmp", slots)])
    temporary.create()
    temporary.write(tensors)
    (file.parent / (file.name + ".tmp")).replace(file)


def _occupied(out: Path) -> ZqError:
    return ZqError(f"another zq is working in {out}; wait for it, or choose another -o")


def _is_locked(folder: Path) -> bool:
    if not (folder / LOCK).is_file():
        return False
    try:
        os.close(_locked(folder))
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    return False


def _locked(folder: Path) -> int:
    """A handle that holds the folder's lock. Raises OSError, EWOULDBLOCK when another holds it."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.fstat(handle).st_nlink:  # its holder finished and removed it meanwhile
            raise BlockingIOError(errno.EWOULDBLOCK, "removed")
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a disk without locks
            os.close(handle)
            raise
    return handle


def check_output(out: Path) -> None:
    """Raises ZqError unless `out` can be created or is an empty folder."""
    try:
        is_file = out.exists() and not out.is_dir()
        is_job = (out / FOLDER / STATE).is_file()
        is_full = out.is_dir() and any(path.name != FOLDER for path in out.iterdir())
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ZqError(f"cannot use output {out}: {error.strerror}; choose another -o") from None
    if is_file:
        raise ZqError(f"output {out} is a file; give a folder that does not exist yet with -o")
    if is_job and _is_locked(out / FOLDER):
        raise _occupied(out)
    if is_job:
        raise ZqError(f"{out} holds an interrupted job; continue it with --resume or delete {out / FOLDER}")
    if is_full:
        raise ZqError(f"output {out} exists and is not empty; choose another -o or delete it")
