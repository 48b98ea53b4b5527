"""Rewrite the last two columns of docs/errors.md with what the commands say now.

usage: python tools/errors_table.py

Runs every row's command in the situation that tests/bad_input.py builds. A row that still matches stays
as it is, so its `…` survive. Read the difference before you commit it.
"""

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.bad_input import SITUATIONS, TABLE, Model, Row, error_lines, read_table, save_model


def refresh(row: Row) -> Row:
    """The row as it should read."""
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            save_model(Path("MODEL"))
            model = Model(Path("MODEL"))
            SITUATIONS[row.id](model)
            done = row.run(Path(name))
        finally:
            os.chdir(home)
    lines = error_lines(done)
    if len(lines) != 1:
        sys.exit(f"{row.id}: exit code {done.code}, {len(lines)} error lines\n{done.err}")
    if row.exit == done.code and row.expects(lines[0]):
        return row
    return replace(row, error=lines[0].removeprefix("error: "), exit=done.code)


def main() -> None:
    text = TABLE.read_text(encoding="utf-8")
    for row in read_table():
        new = refresh(row)
        if str(row) not in text:
            sys.exit(f"{row.id}: the row is not formatted as it should be: {row}")
        text = text.replace(str(row), str(new))
    TABLE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
