"""A run that is stopped from outside continues where it was, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import transformers

from tests.command import run, start
from tests.tiny import TINY, build_tiny
from zq.errors import ZqError

BLOCKS = 60  # some seconds of work: long enough that a signal always comes before the end
COMMAND = ("quantize", "MODEL", "--w4a8", "--calib", "random", "-o", "OUT")


@pytest.fixture(scope="module")
def deep(tmp_path_factory) -> Path:
    """A tiny Llama of 60 blocks in which every tensor differs."""
    folder = tmp_path_factory.mktemp("deep") / "MODEL"
    original = TINY["llama"]
    config = original()
    config.num_hidden_layers = BLOCKS
    try:
        TINY["llama"] = lambda: config
        build_tiny("llama").save_pretrained(folder)
    finally:
        TINY["llama"] = original
    assert isinstance(config, transformers.LlamaConfig)
    return folder


def wait_for_blocks(child: subprocess.Popen, job: Path, more_than: int) -> int:
    """Wait until the job has committed another block; how many units are done then."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        assert child.poll() is None, f"the run ended by itself: {child.communicate()}"
        try:
            done = len(json.loads(job.read_text())["done"])
        except FileNotFoundError:
            done = 0
        if done > more_than:
            return done
        time.sleep(0.005)  # polling a file of another process; nothing depends on the length
    raise AssertionError("no block was committed in time")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the report, which holds times."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "zq_report.json"}


def test_signals_stop_a_run_and_resume_finishes_it_with_the_same_bytes(deep, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for place in (whole, broken):
        place.mkdir()
        (place / "MODEL").symlink_to(deep)
    job = broken / "OUT" / ".zq-job" / "job.json"
    done = 1  # "outside" is copied at once; a block is what counts
    for signum, code in ((signal.SIGINT, 75), (signal.SIGTERM, 75), (signal.SIGKILL, -signal.SIGKILL)):
        child = start(*COMMAND, *(["--resume"] if done > 1 else []), cwd=broken)
        done = wait_for_blocks(child, job, done)
        child.send_signal(signum)
        out, err = child.communicate(timeout=60)
        assert child.returncode == code, err
        assert out == ""
        assert "Traceback" not in err
        if code == 75:
            last = err.rstrip().splitlines()[-1]
            assert last.startswith("error: interrupted; finished blocks are kept, continue with: zq quantize")
            assert last.endswith("-o OUT --resume")
            assert last.count("--resume") == 1
        assert done < BLOCKS, "the run was over before the signal came"
        names = {path.name for path in (broken / "OUT").iterdir()}
        assert names == {".zq-job"}, "an interrupted run must not look complete"

    monkeypatch.chdir(broken)
    resumed = run(*COMMAND, "--resume").ok()
    assert resumed.err.count("layers, worst") < BLOCKS, "the finished blocks were done again"
    monkeypatch.chdir(whole)
    run(*COMMAND).ok()
    assert contents(broken / "OUT") == contents(whole / "OUT")
    ours, theirs = (json.loads((p / "OUT" / "zq_report.json").read_text()) for p in (broken, whole))
    assert ours["layers"] == theirs["layers"]
    assert ours["output_error"] == theirs["output_error"]
    assert ours["command"] == theirs["command"] == "zq " + " ".join(COMMAND)


def test_json_says_that_it_was_interrupted(deep, tmp_path):
    (tmp_path / "MODEL").symlink_to(deep)
    child = start(*COMMAND, "--json", cwd=tmp_path)
    wait_for_blocks(child, tmp_path / "OUT" / ".zq-job" / "job.json", 0)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert json.loads(out)["exit_code"] == 75
    assert json.loads(out)["error"].endswith("-o OUT --json --resume")
    assert "Traceback" not in err


def test_an_interruption_before_the_job_exists_promises_nothing(deep, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("zq.pipeline._fingerprint", lambda plan: os.kill(os.getpid(), signal.SIGTERM))
    done = run("quantize", deep, "--w8a8", "--calib", "random", "-o", "OUT")
    assert done.code == 130
    assert "--resume" not in done.err
    assert not Path("OUT").exists()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("comes_out_as", [ValueError, ZqError, None])
def test_an_interruption_that_a_library_turned_into_something_else(signum, comes_out_as, deep, monkeypatch):
    """torch does that: KeyboardInterrupt inside its C code can arrive as a ValueError about shapes."""

    def stop(*args: object) -> None:
        try:
            os.kill(os.getpid(), signum)
        except KeyboardInterrupt:
            if comes_out_as is None:
                raise
            raise comes_out_as("something else") from None

    # A shell starts what it runs in the background with SIGINT ignored.
    before = signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL
    found = signal.signal(signum, before)
    try:
        monkeypatch.setattr("zq.cli.inspect.describe", stop)
        done = run("inspect", deep)
        assert (done.code, done.out, done.err) == (130, "", "interrupted\n")
        assert signal.getsignal(signum) is before
    finally:
        signal.signal(signum, found)


def test_an_ignored_signal_stays_ignored(deep, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        from zq.cli.inspect import describe

        def stop(folder: Path) -> dict:
            os.kill(os.getpid(), signal.SIGINT)
            return describe(folder)

        monkeypatch.setattr("zq.cli.inspect.describe", stop)
        run("inspect", deep).ok()
    finally:
        signal.signal(signal.SIGINT, before)
