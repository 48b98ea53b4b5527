"""zq bench: a table, a file, a figure."""

from __future__ import annotations

import json
import signal
import time

import pytest

from tests.command import run, start
from zq.cli.bench_show import as_markdown, table

SHORT = ("--length", "8", "--new", "4", "--seconds", "0", "--device", "cpu")


@pytest.fixture(scope="module")
def done(llama, w4a8, tmp_path_factory):
    """(what the command said, its folder with speed.json and speed.svg)."""
    out = tmp_path_factory.mktemp("bench")
    files = ("--json", out / "speed.json", "--plot", out / "speed.svg", "--commit", "abc1234")
    said = run("bench", w4a8, "--against", llama, "--batch", "1,2", *SHORT, *files, "--markdown").ok()
    return said, out


def test_the_file_has_every_row_and_what_it_was_measured_on(done, llama, w4a8):
    held = json.loads((done[1] / "speed.json").read_text())
    assert held["complete"] is True
    assert held["environment"]["commit"] == "abc1234"
    setting = held["setting"]
    assert (setting["folder"], setting["against"]) == (str(w4a8), str(llama))
    assert (setting["mode"], setting["length"], setting["new"]) == ("decode", 8, 4)
    rows = held["rows"]
    assert [(row["engine"], row["batch"]) for row in rows] == [
        *(("zq", 1), ("zq", 2), ("eager", 1), ("eager", 2))
    ]
    for own, other in zip(rows[:2], rows[2:], strict=True):
        ratio = own["faster"]["eager"]["ms_per_token"]
        assert ratio == pytest.approx(other["ms_per_token"] / own["ms_per_token"], rel=1e-2)
        assert "faster" not in other


def test_the_table_is_on_standard_output_and_progress_is_not(done):
    said, out = done
    lines = said.out.splitlines()
    assert lines[0] == "| batch | engine | prefill ms | ms / token | tokens / s | peak memory | × eager |"
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        *(["| 1", "zq"], ["| 1", "eager"], ["| 2", "zq"], ["| 2", "eager"])
    ]
    assert "eager: batch 2" in said.err
    assert str(out / "speed.json") in said.err
    assert (out / "speed.svg").read_text().startswith("<?xml")


def test_an_encoder_is_measured_by_batches(bert):
    said = run("bench", bert, "--length", "8", "--batch", "2", "--seconds", "0", "--device", "cpu").ok()
    assert said.out.splitlines()[0].split() == [
        *("batch", "engine", "ms", "/", "batch", "sequences", "/", "s", "peak", "memory")
    ]


def test_ctrl_c_keeps_the_rows_so_far(llama, w4a8, tmp_path):
    file = tmp_path / "speed.json"
    batches = ",".join(map(str, range(1, 50)))
    command = ("bench", str(w4a8), "--against", str(llama), "--batch", batches, *SHORT, "--json", str(file))
    child = start(*command, cwd=tmp_path)
    deadline = time.monotonic() + 100
    while not file.exists() or len(json.loads(file.read_text())["rows"]) < 2:
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 130, err
    assert err.rstrip().splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
    held = json.loads(file.read_text())
    assert held["complete"] is False
    assert 2 <= len(held["rows"]) < 98
    assert len(out.splitlines()) == 1 + len(held["rows"]), "the table of what there is"
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_failed_rows_say_why_in_the_table():
    memory = {"held": 1, "peak": 2_000_000, "reserved": None}
    rows = [
        {"engine": "zq", "batch": 1, "ms_per_batch": 0.5, "sequences_per_s": 2000.0, "memory": memory}
        | {"faster": {"eager": {"ms_per_batch": 2.0}}},
        {"engine": "eager", "batch": 1, "ms_per_batch": 1.0, "sequences_per_s": 1000.0, "memory": memory},
        {"engine": "compiled", "batch": 1, "error": "out of memory"},
    ]
    heads, cells = table(rows, "encode")
    assert heads[-2:] == ["× eager", "× compiled"]
    assert cells[0] == ["1", "zq", "0.5", "2000", "2.0 MB", "2", ""]
    assert cells[2] == ["1", "compiled", "out of memory", "", "", "", ""]
    assert as_markdown(["a", "b"], [["1|2", "3"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
