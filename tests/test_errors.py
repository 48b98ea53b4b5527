"""docs/errors.md is true: every situation gives its one line, its exit code, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.bad_input import KEPT, PROCESSES, SITUATIONS, Model, Row, error_lines, read_table, save_model
from tests.command import run

ROWS = read_table()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("healthy") / "MODEL"
    save_model(folder)
    return folder


@pytest.fixture
def model(healthy, tmp_path, monkeypatch) -> Model:
    """A copy to break, in the current directory."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(healthy, tmp_path / "MODEL")
    return Model(Path("MODEL"))


def tree(folder: Path) -> dict[str, bytes]:
    """Every folder and the content of every file below `folder`."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else b"a folder"
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_row(row: Row, model: Model, tmp_path: Path):
    SITUATIONS[row.id](model)
    before = tree(tmp_path)
    done = row.run(tmp_path)
    lines = error_lines(done)
    assert len(lines) == 1, done.err
    assert row.expects(lines[0]), f"the table says\n  error: {row.error}\nbut the command says\n  {lines[0]}"
    assert done.err.rstrip().endswith(lines[0]), "something follows the error"
    assert done.code == row.exit
    assert "Traceback" not in done.err + done.out
    assert done.out == ""
    left = {name for name in tree(tmp_path) if name not in before}
    if row.id in KEPT:
        assert {name.split("/")[1] for name in left if "/" in name} == {".zq-job"}
    else:
        assert tree(tmp_path) == before, f"left behind: {sorted(left)}"


def test_the_table_and_the_situations_are_the_same_list():
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)
    assert set(ids) == set(SITUATIONS)
    assert set(ids) >= set(PROCESSES) | KEPT
    assert len(ids) >= 24


def test_the_rows_are_formatted_as_the_generator_writes_them():
    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    for row in ROWS:
        assert str(row) in text


def test_the_exit_codes_are_those_of_the_program():
    from zq.cli.console import EXIT_CODES

    text = (Path(__file__).parent.parent / "docs" / "errors.md").read_text(encoding="utf-8")
    for code in EXIT_CODES:
        assert f"\n| {code} | " in text


def test_an_ellipsis_does_not_hide_our_own_words():
    row = Row("x", "", "zq", "cannot read A (…); try B", 2)
    assert row.expects("error: cannot read A (whatever); try B")
    assert not row.expects("error: cannot read A (whatever)")
    assert not row.expects("error: cannot read A (whatever); try B or C")


@pytest.mark.parametrize(
    "args",
    [
        ("quantize", "NOWHERE", "--w8a8", "-o", "OUT"),
        ("eval", "NOWHERE"),
        ("generate", "NOWHERE", "Hello"),
        ("inspect", "NOWHERE"),
        ("recipes", "show", "w9"),
    ],
    ids=lambda args: args[0],
)
def test_json_carries_the_error(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*args, "--json")
    assert done.code == 2
    assert done.json == {"error": error_lines(done)[0].removeprefix("error: "), "exit_code": 2}


def test_json_of_a_failed_audit_says_3(model):
    SITUATIONS["audit-failed"](model)
    done = run("inspect", "OUT", "--audit", "--json")
    assert (done.code, done.json["exit_code"]) == (3, 3)


def test_a_defect_keeps_its_traceback(model, monkeypatch):
    def broken(folder: Path) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr("zq.cli.inspect.describe", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        run("inspect", "MODEL")


def test_a_refused_resume_keeps_the_job(model):
    SITUATIONS["resume-other-recipe"](model)
    assert run("quantize", "MODEL", "--w4a8", "--calib", "random", "-o", "OUT", "--resume").code == 2
    state = json.loads(Path("OUT/.zq-job/job.json").read_text())
    assert len(state["done"]) == 2
    done = run("quantize", "MODEL", "--w8a8", "--calib", "random", "-o", "OUT", "--resume").ok()
    assert not Path("OUT/.zq-job").exists()
    assert "Traceback" not in done.err


def test_a_full_disk_leaves_a_job_that_continues(model, tmp_path):
    SITUATIONS["disk-full-later"](model)
    row = next(row for row in ROWS if row.id == "disk-full-later")
    assert row.run(tmp_path).code == 75
    run("quantize", "MODEL", "--w8a8", "--calib", "random", "-o", "OUT", "--resume").ok()
    run("inspect", "OUT", "--audit").ok()
