"""kill -9 after every unit, and everything that must not be continued."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.simulate import recipe, stop_after
from tests.tiny import save_tiny
from zq.checkpoint.job import FOLDER
from zq.errors import OutputError, ZqError
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.recipe import Recipe

RULES = "@mlp = int4:g32 @ int8:token; @attention = int8:channel @ int8:token"
SHARD = 25_000
UNITS = 5  # outside, three blocks, tail

# argv: source, out, recipe text, 1 to resume, when to die, shard bytes.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
import zq.checkpoint.writer as writer

source, out, text, resume, when, shard = sys.argv[1:]
seen = 0

def die(event):
    global seen
    seen += "unit" in event
    if when == f"unit {seen}":
        os.kill(os.getpid(), signal.SIGKILL)

def dying(real, name):
    count = 0
    def call(*args, **kwargs):
        nonlocal count
        if when == f"{name} {count}":
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return real(*args, **kwargs)
    return call

writer.ShardWriter.create = dying(writer.ShardWriter.create, "create")
os.posix_fallocate = dying(os.posix_fallocate, "allocate")
if when.startswith("publish"):
    real = writer.ShardWriter.publish
    def publish(self, target):
        os.replace = dying(os.replace, "publish")
        return real(self, target)
    writer.ShardWriter.publish = publish
if when == "finish":
    import shutil
    shutil.rmtree = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
plan = make_plan(Path(source), Recipe.parse(text), shard_bytes=int(shard))
quantize(plan, Path(out), resume=resume == "1", progress=die, command="c")
"""


def run(source: Path, out: Path, when: str, *, resume: bool = False) -> int:
    """Return code of a quantization in a process of its own, -9 when it was killed."""
    arguments = [str(source), str(out), str(recipe(RULES)), "1" if resume else "0", when, str(SHARD)]
    return subprocess.run(
        [sys.executable, "-c", KILLED, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    ).returncode


def plan_of(source: Path, rules: str = RULES, shard: int = SHARD) -> Plan:
    return make_plan(source, recipe(rules), shard_bytes=shard)


def content(out: Path) -> dict[str, bytes]:
    """Every file; the report without the time it took."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    report = json.loads(files["zq_report.json"])
    del report["seconds"], report["seconds_of"]
    files["zq_report.json"] = json.dumps(report).encode()
    return files


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    save_tiny("qwen2", folder, torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(source, out, "never") == 0
    files = content(out)
    assert len([name for name in files if name.startswith("model-")]) > 3
    return files


def check_resumed(source: Path, out: Path, whole: dict[str, bytes]) -> None:
    """Continue here, in this process, and compare every file."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quantize(plan_of(source), out, resume=True, command="c")
    finally:
        torch.set_num_threads(threads)
    got = content(out)
    assert got.keys() == whole.keys()
    assert [name for name in got if got[name] != whole[name]] == []


@pytest.mark.parametrize("unit", range(1, UNITS + 1))
def test_killed_after_a_unit(unit: int, source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out, f"unit {unit}") == -signal.SIGKILL
    assert not list(out.glob("*.safetensors*")), "nothing looks complete"
    assert len(json.loads((out / FOLDER / "job.json").read_text())["done"]) == unit
    check_resumed(source, out, whole)


@pytest.mark.parametrize("when", ["create 0", "allocate 1", "publish 0", "publish 1", "publish 4", "finish"])
def test_killed_while_the_files_are_made_or_moved(
    when: str, source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run(source, out, when) == -signal.SIGKILL
    if when == "finish":  # everything is published, and no job is left to continue
        with pytest.raises(ZqError, match="holds no interrupted job"):
            quantize(plan_of(source), out, resume=True)
        assert (out / "model.safetensors.index.json").is_file()
        return
    assert not (out / "model.safetensors.index.json").exists()
    check_resumed(source, out, whole)


def test_killed_again_and_again(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(source, out, "unit 2") == -signal.SIGKILL
    assert run(source, out, "unit 1", resume=True) == -signal.SIGKILL
    assert run(source, out, "publish 2", resume=True) == -signal.SIGKILL
    assert run(source, out, "publish 3", resume=True) == -signal.SIGKILL
    check_resumed(source, out, whole)


FOLDED = "- smoothquant: {search: true}\n- awq: {windows: 2}\n- rtn: {}\n"
LEARNED = "- awq: {windows: 2}\n- gptq: {asymmetry: 0.5}\n- lkd: {iterations: 6, batch: 1, lookahead: 1}\n"
IN_INTEGERS = "- rtn: {}\n- lkd: {iterations: 6, batch: 1, gradients: int8}\n"


@pytest.mark.parametrize("unit", [2, 3])
@pytest.mark.parametrize("steps", [FOLDED, LEARNED, IN_INTEGERS], ids=["folded", "learned", "integers"])
def test_other_steps_resume_to_the_same_bytes(steps: str, unit: int, source: Path, tmp_path: Path) -> None:
    """Blocks after the interruption are made by what the carried activations say, and random numbers do not
    depend on what was drawn before."""
    text = re.sub(r"steps:\n(- .*\n|  .*\n)*", f"steps:\n{steps}", str(recipe(RULES)))
    wanted = Recipe.parse(text.replace("length: 16", "length: 32"))
    report = quantize(make_plan(source, wanted, shard_bytes=SHARD), tmp_path / "whole").report
    torch.manual_seed(1)
    with pytest.raises(KeyboardInterrupt):
        quantize(make_plan(source, wanted, shard_bytes=SHARD), tmp_path / "out", progress=stop_after(unit))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    quantize(make_plan(source, wanted, shard_bytes=SHARD), tmp_path / "out", resume=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    if "awq" in steps:
        assert set(report["changed"]) == set(report["smoothing"]) == {"0", "1", "2"}
    assert [step.name for step in wanted.steps] == re.findall(r"- ([a-z]+):", steps)


def interrupted(source: Path, out: Path, after: int = 2) -> None:
    """Stop after some units, in this process."""
    with pytest.raises(KeyboardInterrupt):
        quantize(plan_of(source), out, progress=stop_after(after))


def test_what_must_not_be_continued(source: Path, tmp_path: Path) -> None:
    own, out = tmp_path / "own", tmp_path / "out"
    save_tiny("qwen2", own, torch.bfloat16)
    interrupted(own, out)
    job = (out / FOLDER / "job.json").read_bytes()
    with pytest.raises(ZqError, match="begun with another recipe"):
        quantize(plan_of(own, "* = int4:g32"), out, resume=True)
    with pytest.raises(ZqError, match="begun with another shard size"):
        quantize(plan_of(own, shard=10**6), out, resume=True)
    with pytest.raises(ZqError, match="begun with another model"):
        quantize(plan_of(source), out, resume=True)
    tensors = load_file(own / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, own / "model.safetensors", {"format": "pt"})
    with pytest.raises(ZqError, match="begun with another model"):
        quantize(plan_of(own), out, resume=True)
    with pytest.raises(ZqError, match="continue it with --resume"):
        quantize(plan_of(own), out)
    assert (out / FOLDER / "job.json").read_bytes() == job


def test_outputs_that_hold_something_are_refused_and_kept(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ZqError, match="holds no interrupted job to resume; run without --resume"):
        quantize(plan_of(source), tmp_path / "out", resume=True)
    (tmp_path / "mine.txt").write_text("x")
    for resume in (False, True):
        with pytest.raises(ZqError):
            quantize(plan_of(source), tmp_path, resume=resume)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_disk_that_fills_up_keeps_what_is_done(
    source: Path, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, real, count = tmp_path / "out", os.fsync, 0

    def full(handle: int) -> None:
        nonlocal count
        count += 1
        if count > 25:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="no space left for"):
        quantize(plan_of(source), out)
    monkeypatch.undo()
    assert json.loads((out / FOLDER / "job.json").read_text())["done"]
    check_resumed(source, out, whole)
