"""A resumable run as a folder: what was asked, which blocks are done, and the live activations.

    OUT/.zq-job/job.json              fingerprint and one report per finished unit
    OUT/.zq-job/carry-<unit>.safetensors   activations that enter the next block, saved verbatim:
                                      recomputing them would not give the same bits
    OUT/.zq-job/shards/               output shards, partly filled

`commit` is the only step that counts: it replaces job.json atomically after everything the unit wrote
is on disk, so a kill at any moment repeats at most one block.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from zq.checkpoint.writer import CODES, Shard, ShardWriter, Slot, write_atomic
from zq.errors import ZqError

FOLDER = ".zq-job"
STATE = "job.json"


class Job:
    """`fingerprint` maps what must not change (model, recipe, version, ...) to a value as text."""

    def __init__(self, out: Path, fingerprint: dict[str, str]) -> None:
        self.out = out
        self.folder = out / FOLDER
        self.shards = self.folder / "shards"
        self.fingerprint = fingerprint
        self.done: dict[str, dict[str, Any]] = {}
        self._carry: str | None = None

    @classmethod
    def begin(cls, out: Path, fingerprint: dict[str, str]) -> Job:
        """A fresh job in `out`, which must be new or empty. Raises ZqError otherwise."""
        check_output(out)
        job = cls(out, fingerprint)
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ZqError(
                f"cannot create {job.folder}: {error.strerror}; choose a writable folder with -o"
            ) from None
        try:
            job._save()
        except ZqError:
            job.discard()
            raise
        return job

    @classmethod
    def resume(cls, out: Path, fingerprint: dict[str, str]) -> Job:
        """Continue the job in `out`. Raises ZqError when there is none or it was begun differently."""
        path = out / FOLDER / STATE
        if not path.is_file():
            raise ZqError(f"{out} holds no interrupted job to resume; run without --resume")
        try:
            state = json.loads(path.read_text())
            old, done, carry = dict(state["fingerprint"]), state["done"], state["carry"]
            if carry and not (out / FOLDER / carry).is_file():
                raise ValueError(f"{carry} is missing")
        except (ValueError, KeyError, TypeError) as error:
            raise ZqError(f"{path} is damaged ({error!r}); delete {out} and run without --resume") from None
        changed = [key for key in fingerprint if old.get(key) != fingerprint[key]]
        if changed:
            raise ZqError(
                f"the job in {out} was begun with another {' and '.join(changed)}; resume with what it was "
                f"begun with, or delete {out / FOLDER} and start anew"
            )
        job = cls(out, fingerprint)
        job.done, job._carry = done, carry
        return job

    def commit(self, unit: str, report: dict[str, Any], carry: dict[str, torch.Tensor] | None = None) -> None:
        """Mark `unit` as done; `carry` replaces the carried activations when given."""
        previous = self._carry
        if carry is not None:
            self._carry = f"carry-{len(self.done):05d}.safetensors"
            _save_tensors(self.folder / self._carry, carry)
        self.done[unit] = report
        self._save()
        if previous is not None and previous != self._carry:
            (self.folder / previous).unlink(missing_ok=True)

    def carried(self) -> dict[str, torch.Tensor]:
        """The activations saved by the last commit that had any."""
        return load_file(self.folder / self._carry) if self._carry else {}

    def finish(self) -> None:
        """Remove the job folder: the output is complete. Its state goes first, so that a kill in between
        does not leave what looks like a job."""
        (self.folder / STATE).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def discard(self) -> None:
        """Undo everything: the job folder, and `out` if nothing else is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.out.is_dir() and not any(self.out.iterdir()):
            self.out.rmdir()

    def _save(self) -> None:
        state = {"fingerprint": self.fingerprint, "carry": self._carry, "done": self.done}
        write_atomic(self.folder / STATE, json.dumps(state, indent=1) + "\n")


def _save_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """One safetensors file: on disk, whole, when this returns. Raises OutputError."""
    slots = tuple(Slot(name, CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items())
    temporary = ShardWriter(file.parent, [Shard(file.name + ".tmp", slots)])
    temporary.create()
    temporary.write(tensors)
    (file.parent / (file.name + ".tmp")).replace(file)


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
    if is_job:
        raise ZqError(f"{out} holds an interrupted job; continue it with --resume or delete {out / FOLDER}")
    if is_full:
        raise ZqError(f"output {out} exists and is not empty; choose another -o or delete it")
