"""A run that can be killed at any moment and continued."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import sys
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
    job.release()
    again = Job.resume(out, PRINT)
    assert again.done == {"outside": {"error": 0.1 + 0.2}, "0": {"error": 1e-17}}
    carried = again.carried()
    assert torch.equal(carried["h.0"].view(torch.int16), x.view(torch.int16)), "bits, NaN included"
    assert torch.equal(carried["h.1"].view(torch.int16), x.T.contiguous().view(torch.int16))
    again.commit("1", {}, {"h.0": torch.ones(1)})
    again.release()
    assert torch.equal(Job.resume(out, PRINT).carried()["h.0"], torch.ones(1))
    assert len(list((out / FOLDER).glob("carry-*"))) == 1, "the last state only"
    again = Job.resume(out, PRINT)
    again.commit("tail", {})
    again.release()
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
    job.release()
    for text in ("{", "{}", "[]", '{"fingerprint": 1}'):
        (job.folder / "job.json").write_text(text)
        with pytest.raises(ZqError, match=r"job\.json is damaged"):
            Job.resume(tmp_path, PRINT)


def test_activations_that_are_gone(tmp_path: Path) -> None:
    job = Job.begin(tmp_path, PRINT)
    job.commit("0", {}, {"h": torch.zeros(4)})
    next(job.folder.glob("carry-*")).unlink()
    job.release()
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


@pytest.mark.parametrize("kill_at", range(8))
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
    job.release()
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
    job.release()
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


HOLDER = """
import sys
from pathlib import Path
from zq.checkpoint.job import Job
job = Job.begin(Path(sys.argv[1]), {"model": "m", "recipe": "r"})
print("ready", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(tmp_path: Path) -> None:
    """While another process works in OUT nobody else may; when it is killed its job can be continued."""
    out = tmp_path / "out"
    root = str(Path(__file__).resolve().parent.parent.parent)
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(out)],
        env={**os.environ, "PYTHONPATH": root},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    state = (out / FOLDER / "job.json").read_bytes()
    try:
        for start in (Job.begin, Job.resume):
            with pytest.raises(ZqError, match=r"another zq is working in .*out; wait for it, or choose"):
                start(out, PRINT)
        (out / FOLDER / "job.json").unlink()  # as in the moment before the other has written its state
        with pytest.raises(ZqError, match="another zq is working in"):
            Job.begin(out, PRINT)
        assert (out / FOLDER / "lock").is_file(), "a refused job must not clean up after the other"
        (out / FOLDER / "job.json").write_bytes(state)
    finally:
        child.kill()
        child.communicate()
    assert Job.resume(out, PRINT).done == {}


def test_numbers_that_json_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Job.begin(tmp_path / "out", PRINT).commit("0", {"error": float("nan")})


def test_a_state_is_durable_before_what_it_replaces_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, events = Job.begin(tmp_path, PRINT), []
    job.commit("0", {}, {"h": torch.zeros(4)})
    replace, fsync, unlink = os.replace, os.fsync, os.unlink

    def synced(handle: int) -> None:
        events.append("folder" if Path(f"/proc/self/fd/{handle}").resolve().is_dir() else "file")
        fsync(handle)

    def replaced(*args: object) -> None:
        events.append(f"replace {Path(str(args[1])).name}")
        replace(*args)  # type: ignore[arg-type]

    def unlinked(path: object, *args: object, **kwargs: object) -> None:
        events.append("unlink")
        unlink(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "unlink", unlinked)
    job.commit("1", {}, {"h": torch.ones(4)})
    assert events[-3:] == ["replace job.json", "folder", "unlink"]
