"""What `zq bench` shows: a line for each row as it comes, then the table, as it is or as markdown."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zq.cli.console import err, listing, note, out, size
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.bench.results import Row
    from zq.bench.subject import Subject
    from zq.bench.task import Task


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """limit: seconds for all; commit: of zq, where git cannot say."""

    limit: float | None
    json: Path | None
    plot: Path | None
    markdown: bool
    commit: str | None


HEADS = {
    "prefill_ms": "prefill ms",
    "ms_per_token": "ms / token",
    "ms_per_batch": "ms / batch",
    "tokens_per_s": "tokens / s",
    "sequences_per_s": "sequences / s",
}


def run(
    subject: Subject,
    task: Task,
    engines: Sequence[str],
    batches: Sequence[int],
    wanted: Wanted,
) -> None:
    """Measure, write what was asked for, show the table. Raises ZqError."""
    from zq.bench import plots
    from zq.bench import run as bench
    from zq.bench.results import Results, environment

    if wanted.plot is not None:
        plots.check_file(wanted.plot)
    setting = {**vars(subject), **vars(task)}
    setting["folder"] = None if subject.folder is None else str(subject.folder)
    results = Results(setting, environment(task.device, wanted.commit), wanted.json)
    try:
        with closing(bench.run(subject, task, engines, batches, wanted.limit, note)) as rows:
            for row in rows:
                results.add(row)
                err.print(_line(row, task.mode), soft_wrap=True, markup=False)
        results.finish()
    finally:
        measured = [row for row in results.rows if "error" not in row]
        if measured:
            _show(results.rows, task, wanted.markdown)
    if not measured:
        raise ZqError(f"nothing could be measured: {results.rows[0]['engine']}: {results.rows[0]['error']}")
    if wanted.plot is not None:
        name = subject.shape or Path(str(subject.folder)).name
        plots.draw(results.rows, task.mode, f"{name}, {results.environment['device']}", wanted.plot)
    for file in (wanted.json, wanted.plot):
        if file is not None:
            note(str(file))


def _line(row: Row, mode: str) -> str:
    from zq.bench.results import RATES, TIMES

    start = f"{row['engine']:<8}  batch {row['batch']:<4}"
    if "error" in row:
        return f"{start}  failed: {row['error']}"
    figures = [f"{HEADS[name]} {_number(row[name])}" for name in (*TIMES[mode], RATES[mode])]
    return "  ".join([start, *figures, f"memory {_memory(row)}"])


def _show(rows: Sequence[Row], task: Task, markdown: bool) -> None:
    heads, cells = table(rows, task.mode)
    if markdown:
        out.print(as_markdown(heads, cells), soft_wrap=True)
    else:
        listing(heads, cells)
    for row in rows:
        if row.get("profile"):
            _kernels(row)


def table(rows: Sequence[Row], mode: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells: batch by batch, what was measured and how many times faster than each baseline. Rows
    that failed say why."""
    from zq.bench.results import RATES, TIMES

    names = [*TIMES[mode], RATES[mode]]
    others = [e for e in dict.fromkeys(row["engine"] for row in rows) if e != "zq"]
    main = TIMES[mode][-1]
    heads = ["batch", "engine", *(HEADS[name] for name in names), "peak memory", *(f"× {e}" for e in others)]
    cells = []
    for row in sorted(rows, key=lambda row: row["batch"]):
        start = [str(row["batch"]), row["engine"]]
        if "error" in row:
            cells.append([*start, row["error"], *[""] * (len(heads) - 3)])
            continue
        faster = row.get("faster", {})
        ratios = [_number(faster[e][main]) if faster.get(e, {}).get(main) else "" for e in others]
        cells.append([*start, *(_number(row[name]) for name in names), _memory(row), *ratios])
    return heads, cells


def as_markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """A table of markdown."""
    lines = [heads, ["---"] * len(heads), *cells]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _kernels(row: Row) -> None:
    found: dict[str, Any] = row["profile"]
    what = f"{row['engine']}, batch {row['batch']}"
    out.print(f"\n{what}: {found['launches']:.0f} launches, {found['busy_ms']:.3f} ms")
    for each in found["top"]:
        out.print(f"  {each['ms']:9.4f} ms  {each['calls']:6.1f} x  {each['name'][:90]}", soft_wrap=True)


def _number(value: float) -> str:
    """Three digits that count."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _memory(row: Row) -> str:
    peak = row["memory"]["peak"]
    return "?" if peak is None else size(peak)
