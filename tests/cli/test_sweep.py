"""zq sweep: what is asked for is measured once, and the same command continues."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.command import run, start
from tests.letters import save_tokenizer
from tests.tiny import save_tiny

GRID = ("--bits", "3,4", "--types", "int,quantile", "--blocks", "64,channel")
ON = ("--windows", "3", "--length", "24", "--devices", "cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Another size of the Llama: one block of it."""
    folder = tmp_path_factory.mktemp("models") / "small"
    save_tiny("llama-tied", folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def done(llama, tmp_path_factory) -> Path:
    """A finished sweep, not to be changed."""
    out = tmp_path_factory.mktemp("sweeps") / "out"
    run("sweep", llama, *GRID, *ON, "-o", out).ok()
    return out


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def test_every_cell_is_measured_once(done):
    specs = [row["cell"]["spec"] for row in rows(done)]
    assert specs == [
        *(None, "int3:b64", "int3:channel", "quantile3:b64", "quantile3:channel"),
        *("int4:b64", "int4:channel", "quantile4:b64", "quantile4:channel"),
    ]
    names = {path.name for path in done.iterdir()}
    assert {"results.jsonl", "index.html", "summary.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_the_same_command_measures_nothing_more(done, llama, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    again = run("sweep", llama, *GRID, *ON, "-o", out).ok()
    assert "9 of 9 cells are there already" in again.err
    for file in ("results.jsonl", "index.html", "summary.json"):
        assert (out / file).read_bytes() == (done / file).read_bytes()


def test_a_larger_grid_measures_the_difference_and_a_torn_line(done, llama, small, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(done, out)
    data = (done / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(data[:-10])
    more = run("sweep", llama, small, *GRID, *ON, "-o", out, "--json").ok()
    assert "was not finished" in more.err
    assert len(rows(out)) == 18
    assert rows(out)[:8] == rows(done)[:8]
    last = next(r for r in rows(out)[8:] if r["key"] == rows(done)[8]["key"])
    assert {**last, "seconds": 0} == {**rows(done)[8], "seconds": 0}
    assert [model["name"] for model in more.json["models"]] == ["small", "llama"]
    assert len(more.json["findings"]) == 6 + 3


def test_a_dry_run_lists_bytes_as_they_are_written(done, llama, tmp_path):
    dry = (
        run("sweep", llama, *GRID, "--types", "int,quantile,nf,e2m1fn", *ON, "--dry-run", "--json").ok().json
    )
    sizes = {cell["cell"]: cell["bytes"] for cell in dry["cells"]}
    for row in rows(done):
        name = f"llama {row['cell']['spec']}" if row["cell"]["spec"] else "llama original"
        assert sizes[name] == row["bytes"]
    assert [each["what"] for each in dry["skipped"]] == ["e2m1fn of 3 bits"]
    assert len(dry["cells"]) == 9 + 4 + 2
    there = run("sweep", llama, *GRID, "--bits", "3,4,5", *ON, "--dry-run", "-o", done).ok().out
    assert there.count("there already") == 9
    assert "4 of 13 cells to measure" in there


def test_what_does_not_exist_is_said_on_the_page_too(llama, tmp_path):
    args = ("--bits", "2,3", "--types", "int,nf", "--blocks", "64", *ON, "-o", tmp_path / "out")
    ended = run("sweep", llama, *args).ok()
    assert "skipped: nf of 2 bits: nf has 3, 4, 5, 6, 7, 8 bits" in ended.err
    assert "nf of 2 bits" in (tmp_path / "out" / "index.html").read_text()


def test_a_recipe_gives_the_steps_and_seeds_are_averaged(llama, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("RECIPE.yaml").write_text(
        "rules: [{match: '*.0.*', skip: true}, {match: '*', weights: 'int8:channel'}]\n"
        "steps: [{rtn: {rounding: stochastic, scale: absmax}}]\ncalibration: {source: none}\n"
    )
    args = ("--recipe", "RECIPE.yaml", "--seeds", "1,2", "--bits", "4", "--types", "int", "--blocks", "64")
    found = run("sweep", llama, *args, *ON, "-o", "OUT", "--json").ok().json
    (cell,) = [cell for cell in found["cells"] if cell["spec"] == "int4:b64"]
    kls = [row["kl"] for row in rows(Path("OUT")) if row["cell"]["spec"]]
    assert cell["seeds"] == 2
    assert kls[0] != kls[1]
    assert cell["kl"] == pytest.approx(sum(kls) / 2)
    full = run("sweep", llama, *GRID, *ON, "--dry-run", "--json").ok().json
    whole = next(c["bytes"]["all"] for c in full["cells"] if c["cell"] == "llama int4:b64")
    assert cell["bytes"]["all"] > whole, "the first block was skipped"


def test_ctrl_c_keeps_what_is_done_and_the_same_command_continues(llama, tmp_path):
    grid = ("--bits", "2,3,4,5,6,7,8", "--types", "int,float,dynamic,nf,quantile", "--blocks", "64,128,1024")
    command = ("sweep", str(llama), *grid, *ON[:4], "--devices", "cpu,cpu", "-o", "OUT")
    child = start(*command, cwd=tmp_path)
    file = tmp_path / "OUT" / "results.jsonl"
    deadline = time.monotonic() + 100
    while not file.exists() or file.read_bytes().count(b"\n") < 3:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 75, err
    last = err.rstrip().splitlines()[-1]
    assert re.match("error: interrupted; finished cells are kept, continue with: zq sweep .* -o OUT$", last)
    assert "Traceback" not in err
    kept = file.read_bytes()
    assert 3 <= kept.count(b"\n") < 90
    assert kept.endswith(b"\n")
    assert [path.name for path in (tmp_path / "OUT").iterdir()] == ["results.jsonl"]
    short = ("--bits", "2", "--types", "int", "--blocks", "64")
    run("sweep", llama, *short, *ON, "-o", tmp_path / "OUT").ok()
    assert file.read_bytes().startswith(kept)


def test_a_failed_cell_is_an_error_at_the_end(llama, tmp_path, monkeypatch):
    from zq.errors import ZqError
    from zq.sweep.measure import Bench

    measure = Bench.measure

    def broken(self, subject, cell):
        if cell.spec == "int3:b64":
            raise ZqError("it is broken")
        return measure(self, subject, cell)

    monkeypatch.setattr(Bench, "measure", broken)
    out = tmp_path / "out"
    ended = run("sweep", llama, *GRID, *ON, "-o", out, "--json")
    assert ended.code == 2
    assert ended.json["error"].startswith("llama int3:b64: it is broken; the others are kept")
    assert len(rows(out)) == 8
    assert "it is broken" in (out / "index.html").read_text()
    monkeypatch.undo()
    run("sweep", llama, *GRID, *ON, "-o", out).ok()
    assert len(rows(out)) == 9


def test_without_matplotlib_it_says_what_to_install(done, llama, tmp_path, monkeypatch):
    monkeypatch.setattr("zq.sweep.plots.is_available", lambda: False)
    out = tmp_path / "out"
    shutil.copytree(done, out)
    assert "pip install 'zq[plots]'" in run("sweep", llama, *GRID, *ON, "-o", out).ok().err


def test_findings_are_what_is_printed(done, llama):
    shown = run("sweep", llama, *GRID, *ON, "-o", done).ok().out
    assert shown.splitlines() == json.loads((done / "summary.json").read_text())["findings"]
    few, _, accuracy = shown.splitlines()[-3:]
    assert few == "3 windows are few: below 8 believe neither intervals nor shares."
    assert accuracy.startswith("Accuracy was not measured. To add it, sweep into another -o with --tasks ")
