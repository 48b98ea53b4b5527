"""results.jsonl: appended, never rewritten; torn lines are cut off, foreign ones refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sweep.conftest import SETTING, row
from zq.errors import ZqError
from zq.sweep.store import FILE, Store, check_setting, key_of, read_rows


def test_rows_are_there_again_and_only_appended(tmp_path):
    out = tmp_path / "a" / "out"
    store = Store(out)
    store.add(row(bits=3))
    before = (out / FILE).read_bytes()
    store.add(row(bits=4))
    store.close()
    assert (out / FILE).read_bytes().startswith(before)
    rows, length = read_rows(out)
    assert [r["cell"]["bits"] for r in rows] == [3, 4]
    assert length == (out / FILE).stat().st_size
    again = Store(out)
    assert again.keys == {row(bits=3)["key"], row(bits=4)["key"]}
    assert again.torn == 0
    again.close()


def test_a_line_that_was_never_finished_is_cut_off_wherever_it_was_cut(tmp_path):
    line = json.dumps(row()).encode() + b"\n"
    for cut in range(1, len(line), 37):
        (tmp_path / FILE).write_bytes(line + line[:cut])
        store = Store(tmp_path)
        assert (len(store.rows), store.torn) == (1, cut)
        store.add(row(bits=8))
        store.close()
        assert [r["cell"]["bits"] for r in read_rows(tmp_path)[0]] == [4, 8]


def test_a_damaged_line_is_not_passed_over(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(row()) + "\n{broken\n" + json.dumps(row(bits=8)) + "\n")
    with pytest.raises(ZqError, match="line 2 is damaged"):
        read_rows(tmp_path)


def test_one_process_at_a_time(tmp_path):
    store = Store(tmp_path / "out")
    store.add(row())
    with pytest.raises(ZqError, match="another zq is sweeping"):
        Store(tmp_path / "out")
    store.close()
    Store(tmp_path / "out").close()


def test_nothing_is_left_of_a_sweep_without_a_row(tmp_path):
    Store(tmp_path / "a" / "out").close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["a file", "a full folder"])
def test_other_outputs_are_refused(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "a file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / "notes").write_text("mine")
    with pytest.raises(ZqError, match=r"choose another|give a folder"):
        read_rows(out)
    with pytest.raises(ZqError, match=r"choose another|give a folder"):
        Store(out)
    assert out.is_file() or [path.name for path in out.iterdir()] == ["notes"]


def test_another_setting_is_refused_naming_what_differs():
    check_setting([row()], SETTING, Path("OUT"))
    with pytest.raises(ZqError, match="measured with windows 5, this one has 6"):
        check_setting([row()], SETTING | {"windows": 6}, Path("OUT"))
    with pytest.raises(ZqError, match="measured with extra None, this one has 1"):
        check_setting([row()], SETTING | {"extra": 1}, Path("OUT"))


def test_keys_depend_on_every_part_and_not_on_the_order_of_settings():
    key = key_of("model", "recipe", {"a": 1, "b": 2})
    assert key == key_of("model", "recipe", {"b": 2, "a": 1})
    others = [
        key_of("other", "recipe", {"a": 1, "b": 2}),
        key_of("model", "other", {"a": 1, "b": 2}),
        key_of("model", "recipe", {"a": 1, "b": 3}),
    ]
    assert len({key, *others}) == 4
