"""Cells over processes: the same rows in any number of them, none twice, none lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.command import ENVIRONMENT
from tests.sweep.conftest import SETTING
from zq.errors import AuditError, Interrupted, OutputError, OutputKept, ZqError
from zq.sweep.grid import NEAREST, Cell, grid
from zq.sweep.measure import Bench
from zq.sweep.run import SCRATCH, Work, sweep
from zq.sweep.store import FILE, Store

TIMES = "seconds"


def tasks(swept):
    cells, _ = grid([s.name for s in swept], [3, 4], ["int", "dynamic"], ["64"], [0])
    return [(s, cell) for s in swept for cell in (s.original, *cells) if cell.model == s.name]


def carry_out(out, wanted, devices=("cpu",), progress=lambda event: None):
    store = Store(out)
    try:
        return sweep(wanted, Work(base=NEAREST, setting=SETTING, devices=list(devices)), store, progress), [
            {name: value for name, value in row.items() if name != TIMES} for row in store.rows
        ]
    finally:
        store.close()


@pytest.fixture(scope="module")
def serial(swept, tmp_path_factory):
    return carry_out(tmp_path_factory.mktemp("serial") / "out", tasks(swept))


def test_in_this_process(serial, swept):
    failed, rows = serial
    assert failed == []
    assert [Cell(**row["cell"]) for row in rows] == [cell for _, cell in tasks(swept)]


def test_two_processes_give_the_same_rows(serial, swept, tmp_path):
    events = []
    failed, rows = carry_out(tmp_path / "out", tasks(swept), ("cpu", "cpu"), events.append)
    assert failed == []
    assert sorted(rows, key=lambda r: r["key"]) == sorted(serial[1], key=lambda r: r["key"])
    assert [event["done"] for event in events] == list(range(1, 11))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE]


def test_a_cell_that_fails_does_not_stop_the_others(serial, swept, tmp_path, monkeypatch):
    measure = Bench.measure

    def broken(self, subject, cell):
        if cell.spec == "int4:b64":
            raise ZqError("it is broken")
        return measure(self, subject, cell)

    monkeypatch.setattr(Bench, "measure", broken)
    failed, rows = carry_out(tmp_path / "out", tasks(swept))
    assert [(cell.model, str(error)) for cell, error in failed] == [
        ("llama", "it is broken"),
        ("llama-tied", "it is broken"),
    ]
    assert rows == [row for row in serial[1] if row["cell"]["spec"] != "int4:b64"]


@pytest.mark.parametrize(
    ("raised", "seen"), [(OutputError("disk"), OutputKept), (AuditError("audit"), AuditError)]
)
def test_a_bad_disk_stops_the_sweep_and_keeps_what_is_done(swept, tmp_path, monkeypatch, raised, seen):
    measure = Bench.measure

    def broken(self, subject, cell):
        if cell.spec:
            self.scratch.mkdir(parents=True)
            raise raised
        return measure(self, subject, cell)

    monkeypatch.setattr(Bench, "measure", broken)
    with pytest.raises(seen):
        carry_out(tmp_path / "out", tasks(swept))
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE]
    assert (tmp_path / "out" / FILE).read_text().count("\n") == 1


def test_a_killed_process_is_said_and_finished_cells_are_kept(swept, tmp_path):
    def kill(event):
        if event["done"] == 2:
            for child in multiprocessing.active_children():
                assert child.pid
                os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(Interrupted, match=r"killed \(signal 9, out of memory\?\)"):
        carry_out(tmp_path / "out", tasks(swept), ("cpu", "cpu"), kill)
    rows = (tmp_path / "out" / FILE).read_text().count("\n")
    assert 2 <= rows < 10
    assert not (tmp_path / "out" / SCRATCH).exists()
    assert multiprocessing.active_children() == []


def test_a_full_disk_under_the_results_keeps_them(swept, tmp_path, monkeypatch):
    """The processes are gone before the folder in which they work is."""
    add = Store.add

    def full(self, row):
        if len(self.rows) == 2:
            raise OutputError("no space left")
        add(self, row)

    monkeypatch.setattr(Store, "add", full)
    with pytest.raises(OutputKept, match="no space left; finished cells are kept"):
        carry_out(tmp_path / "out", tasks(swept), ("cpu", "cpu"))
    assert multiprocessing.active_children() == []
    assert [p.name for p in (tmp_path / "out").iterdir()] == [FILE]


def test_a_child_ends_when_its_parent_is_killed(tmp_path):
    """Even by SIGKILL, which nobody can answer."""
    program = (
        "import multiprocessing as m, os, signal, time\n"
        "from zq.sweep.run import Work, _serve\n"
        "from zq.sweep.grid import NEAREST\n"
        "from pathlib import Path\n"
        "if __name__ == '__main__':\n"
        "    c = m.get_context('spawn')\n"
        "    ours, theirs = c.Pipe()\n"
        "    work = Work(base=NEAREST, setting={}, devices=['cpu'])\n"
        "    child = c.Process(target=_serve, args=(theirs, 'cpu', work, Path('x')))\n"
        "    child.start()\n"
        "    print(child.pid, flush=True)\n"
        "    time.sleep(100)\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(program)
    parent = subprocess.Popen(
        [sys.executable, str(script)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    child = int(parent.stdout.readline())
    os.kill(child, 0)  # it lives
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.kill(child, 0)
            stat = Path(f"/proc/{child}/stat").read_text()
        except OSError:
            return
        if stat.rpartition(")")[2].split()[0] == "Z":  # nobody reaps orphans in some containers
            return
        time.sleep(0.05)
    raise AssertionError("the child outlived its parent")
