"""A run that can be killed at any moment and continued."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path

import pytest
import torch

from zq.checkpoint.job import FOLDER, Job, check_output
from zq.errors import OutputError, ZqError

PRINT = {"model": "m", "recipe": "r"}


def test_commits_survive(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b"
    job = Job.begin(out, PRINT)
    x = torch.randn(3, 5).bfloat16()
    x[0, 0] = float("nan")
    job.commit("outside", {"error": 0.1 + 0.2})
    job.commit("0", {"error": 1e-17}, {"h.0": x, "h.1": x.T})
    again = Job.resume(out, PRINT)
    assert again.done == {"outside": {"error": 0.1 + 0.2}, "0": {"error": 1e-17}}
    carried = again.carried()
    assert torch.equal(carried["h.0"].view(torch.int16), x.view(torch.int16)), "bits, NaN included"
    assert torch.equal(carried["h.1"].view(torch.int16), x.T.contiguous().view(torch.int16))
    again.commit("1", {}, {"h.0": torch.ones(1)})
    assert torch.equal(Job.resume(out, PRINT).carried()["h.0"], torch.ones(1))
    assert len(list((out / FOLDER).glob("carry-*"))) == 1, "the last state only"
    again.commit("tail", {})
    assert torch.equal(Job.resume(out, PRINT).carried()["h.0"], torch.ones(1))
    again.finish()
    assert list(out.iterdir()) == []


def test_a_job_without_activations_carries_none(tmp_path: Path) -> None:
    assert Job.begin(tmp_path / "o", PRINT).carried() == {}


@pytest.mark.parametrize("key", ["model", "recipe"])
def test_a_foreign_job_is_refused_and_stays(tmp_path: Path, key: str) -> None:
    Job.begin(tmp_path, PRINT).commit("0", {})
    with pytest.raises(ZqError, match=f"begun with another {key}; resume with what"):
        Job.resume(tmp_path, PRINT | {key: "x"})
    assert Job.resume(tmp_path, PRINT).done == {"0": {}}
    with pytest.raises(ZqError, match="another version"):
        Job.resume(tmp_path, PRINT | {"version": "2"})


def test_no_job_and_a_damaged_one(tmp_path: Path) -> None:
    with pytest.raises(ZqError, match="holds no interrupted job to resume; run without --resume"):
        Job.resume(tmp_path, PRINT)
    job = Job.begin(tmp_path, PRINT)
    for text in ("{", "{}", "[]", '{"fingerprint": 1}'):
        (job.folder / "job.json").write_text(text)
        with pytest.raises(ZqError, match=r"job\.json is damaged"):
            Job.resume(tmp_path, PRINT)


def test_activations_that_are_gone(tmp_path: Path) -> None:
    job = Job.begin(tmp_path, PRINT)
    job.commit("0", {}, {"h": torch.zeros(4)})
    next(job.folder.glob("carry-*")).unlink()
    with pytest.raises(ZqError, match=r"damaged .* is missing"):
        Job.resume(tmp_path, PRINT)


def test_outputs_that_are_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ZqError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(ZqError, match="is not empty; choose another"):
        check_output(tmp_path)
    Job.begin(tmp_path / "job", PRINT)
    with pytest.raises(ZqError, match="continue it with --resume"):
        check_output(tmp_path / "job")
    (tmp_path / "empty").mkdir()
    check_output(tmp_path / "empty")
    check_output(tmp_path / "new")
    with pytest.raises(ZqError, match=r"cannot create .*Not a directory"):
        Job.begin(tmp_path / "file" / "under", PRINT)


def test_a_kill_before_the_first_state_leaves_a_folder_that_can_be_used(tmp_path: Path) -> None:
    (tmp_path / FOLDER / "shards").mkdir(parents=True)
    with pytest.raises(ZqError, match="run without --resume"):
        Job.resume(tmp_path, PRINT)
    assert Job.begin(tmp_path, PRINT).done == {}


def test_a_kill_while_finishing_leaves_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.begin(tmp_path, PRINT)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    monkeypatch.setattr("shutil.rmtree", lambda *a, **k: None)
    job.finish()
    with pytest.raises(ZqError, match="is not empty"):
        check_output(tmp_path)


@pytest.mark.parametrize("kill_at", range(6))
def test_commit_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int) -> None:
    """Stopped before its n-th rename or sync, a commit has happened completely or not at all."""
    job = Job.begin(tmp_path, PRINT)
    job.commit("0", {"n": 0}, {"h": torch.zeros(4)})
    count = 0
    real = {name: getattr(os, name) for name in ("replace", "rename", "fsync", "unlink")}

    def stopping(name: str):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count > kill_at:
                raise KeyboardInterrupt
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, stopping(name))
    with contextlib.suppress(KeyboardInterrupt):
        job.commit("1", {"n": 1}, {"h": torch.ones(4)})
    monkeypatch.undo()
    again = Job.resume(tmp_path, PRINT)
    expected = torch.ones(4) if "1" in again.done else torch.zeros(4)
    assert torch.equal(again.carried()["h"], expected)
    json.loads((tmp_path / FOLDER / "job.json").read_text())


def test_a_full_disk_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job.begin(tmp_path, PRINT)
    job.commit("0", {}, {"h": torch.zeros(4)})

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError, match="no space left"):
        job.commit("1", {}, {"h": torch.ones(4)})
    monkeypatch.undo()
    again = Job.resume(tmp_path, PRINT)
    assert list(again.done) == ["0"]
    assert torch.equal(again.carried()["h"], torch.zeros(4))


def test_discard_removes_the_folder_it_made_and_nothing_else(tmp_path: Path) -> None:
    Job.begin(tmp_path / "o", PRINT).discard()
    assert not (tmp_path / "o").exists()
    job = Job.begin(tmp_path / "p", PRINT)
    (tmp_path / "p" / "mine.txt").write_text("x")
    job.discard()
    assert [p.name for p in (tmp_path / "p").iterdir()] == ["mine.txt"]
