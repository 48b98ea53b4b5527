"""What `zq sweep` shows: the list of a dry run, one line per cell and a bar, the findings."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zq.cli.console import err, listing, note, out, print_json, size
from zq.cli.signals import leaving
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.sweep.grid import Cell, Skipped
    from zq.sweep.run import Task, Work


def run(
    wanted: list[Task],
    skipped: list[Skipped],
    work: Work,
    output: Path | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Measure what is missing and report on all there is, or only list it. Raises ZqError."""
    from zq.sweep.measure import cell_key
    from zq.sweep.store import check_setting, read_rows

    rows = read_rows(output)[0] if output else []
    if output:
        check_setting(rows, work.setting, output)
    for each in skipped:
        note(f"skipped: {each.what}: {each.why}")
    done = {row["key"] for row in rows}
    missing = [task for task in wanted if cell_key(*task, work.base, work.setting) not in done]
    if dry_run or output is None:
        return _show(wanted, missing, skipped, work, as_json)
    failed = _measure(missing, work, output, len(wanted), as_json)
    _report(output, skipped, failed, as_json)


def _measure(
    missing: list[Task], work: Work, output: Path, total: int, quiet: bool
) -> list[tuple[Cell, ZqError]]:
    """Every missing cell with one line each and a bar."""
    from zq.sweep.measure import planned
    from zq.sweep.run import stop, sweep
    from zq.sweep.store import Store

    if len(missing) < total:
        note(f"{total - len(missing)} of {total} cells are there already")
    for subject, cell in missing:
        planned(subject, cell, work.base)  # everything wrong with any of them, before the first
    store = Store(output)
    if store.torn:
        note(f"the last line of {store.path} was not finished; it was cut off and its cell is measured again")

    def interrupted() -> str:
        stop(output)
        return f"interrupted; finished cells are kept, continue with: {shlex.join(['zq', *sys.argv[1:]])}"

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    try:
        with (
            Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar,
            leaving(interrupted, quiet),
        ):
            task = bar.add_task("cells", total=len(missing))

            def show(event: dict[str, Any]) -> None:
                bar.advance(task)
                if not quiet:
                    err.print(_line(event), soft_wrap=True, markup=False)

            return sweep(missing, work, store, show) if missing else []
    finally:
        store.close()


def _line(event: dict[str, Any]) -> str:
    start = f"{event['done']}/{event['of']}  {event['cell']!s:<36}"
    if "error" in event:
        return f"{start}  failed: {event['error']}"
    row = event["row"]
    took = sum(row["seconds"].values())
    return (
        f"{start}  {size(row['bytes']['all']):>9}  KL {row['kl']:.4f}  PPL {row['ppl']:.3f}  "
        f"{took:.1f} s, ETA {event['left']:.0f} s"
    )


def _show(wanted: list[Task], missing: list[Task], skipped: list[Skipped], work: Work, as_json: bool) -> None:
    """The dry run."""
    from zq.sweep.forecast import seconds
    from zq.sweep.measure import planned, sizes

    rows, total = [], 0.0
    for subject, cell in wanted:
        plan = planned(subject, cell, work.base)
        took = seconds(plan, cell, work.setting) if (subject, cell) in missing else 0.0
        total += took / len(work.devices)
        rows.append(
            {"cell": str(cell), "bytes": sizes(plan, cell), "done": took == 0, "seconds": round(took, 1)}
        )
    if as_json:
        return print_json(
            {"cells": rows, "skipped": [vars(each) for each in skipped], "seconds": round(total, 1)}
        )
    listing(
        ("cell", "bytes", "in blocks", "time"),
        [
            (
                row["cell"],
                str(row["bytes"]["all"]),
                str(row["bytes"]["blocks"]),
                "there already" if row["done"] else f"{row['seconds']:.0f} s",
            )
            for row in rows
        ],
    )
    out.print(
        f"{len(missing)} of {len(wanted)} cells to measure, about {total:.0f} s; nothing was written",
        soft_wrap=True,
    )


def _report(output: Path, skipped: list[Skipped], failed: list[tuple[Cell, ZqError]], as_json: bool) -> None:
    """Figures, page and findings from all rows in OUT. Raises ZqError when a cell failed."""
    from zq.sweep import plots
    from zq.sweep.report import write_report
    from zq.sweep.store import read_rows

    rows = read_rows(output)[0] if output.exists() else []
    reasons = [(each.what, each.why) for each in skipped] + [
        (str(cell), str(error)) for cell, error in failed
    ]
    if rows:
        summary = write_report(rows, output, reasons)
        if not plots.is_available():
            note("no figures: matplotlib is not installed; pip install 'zq[plots]' and run the same again")
        if as_json and not failed:
            return print_json(summary)
        if not as_json:
            for sentence in summary["findings"]:
                out.print(sentence, soft_wrap=True, markup=False)
            for file in summary["files"]:
                note(file)
    if failed:
        cell, error = failed[0]
        kept = "; the others are kept, and the same command tries these again" if rows else ""
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ZqError(f"{cell}{more}: {error}{kept}")
