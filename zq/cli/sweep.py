"""zq sweep: a grid of quantizations, measured, with its Pareto front."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zq.cli.console import MAX_SEED, check_number, command, err, listing, note, out, print_json, size, torch_device
from zq.cli.signals import leaving
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.recipe import Recipe
    from zq.sweep.grid import Cell, Skipped
    from zq.sweep.measure import Subject
    from zq.sweep.run import Work

GRID, EVALUATION, RUN = "Grid", "Evaluation", "Run"


def sweep(  # noqa: PLR0913 (a command line is its options)
    models: Annotated[
        list[str], typer.Argument(help="Checkpoint folders, hub ids, or `demo`; for a front over sizes, a family.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of the sweep. Needed unless --dry-run.")
    ] = None,
    bits: Annotated[
        str, typer.Option("--bits", help="Widths of the weights, 2 to 8.", rich_help_panel=GRID)
    ] = "3,4,5,6,8",
    types: Annotated[
        str,
        typer.Option(
            "--types",
            help="Data types: int, float, float-paper, dynamic, linear, nf, quantile, kmeans, or formats by name.",
            rich_help_panel=GRID,
        ),
    ] = "int,float,dynamic,quantile",
    blocks: Annotated[
        str,
        typer.Option(
            "--blocks", help="Values that share a scale, or channel, tensor, rank1, gN.", rich_help_panel=GRID
        ),
    ] = "64,128,1024",
    recipe: Annotated[
        str | None,
        typer.Option(
            "--recipe",
            help="Steps, calibration, skipped layers and activations; every cell puts its own weights there. "
            "Default: round to nearest with absmax scales, weights only.",
            rich_help_panel=GRID,
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option("--preset", help="Steps and calibration; see `zq recipes`.", rich_help_panel=GRID),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Seeds of the recipe; figures are means over them.", rich_help_panel=GRID)
    ] = "0",
    text: Annotated[
        str,
        typer.Option(
            "--text",
            help="bundled-eval, a .txt, .jsonl or .parquet file, or hf:DATASET.",
            rich_help_panel=EVALUATION,
        ),
    ] = "bundled-eval",
    windows: Annotated[
        int, typer.Option("--windows", help="Windows of text.", rich_help_panel=EVALUATION)
    ] = 8,
    length: Annotated[
        int, typer.Option("--length", help="Tokens per window.", rich_help_panel=EVALUATION)
    ] = 512,
    start: Annotated[
        float, typer.Option("--start", help="Fraction of the text to skip, 0 to 1.", rich_help_panel=EVALUATION)
    ] = 0.0,
    batch: Annotated[
        int, typer.Option("--batch", help="Windows per forward pass.", rich_help_panel=EVALUATION)
    ] = 1,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks of lm-eval for zero-shot accuracy, for example lambada_openai,piqa; the package and the "
            "data must be on this machine.",
            rich_help_panel=EVALUATION,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", help="Examples of each task. Default: all.", rich_help_panel=EVALUATION),
    ] = None,
    devices: Annotated[
        str,
        typer.Option(
            "--devices",
            help="One process for each: cuda:0,cuda:1, or cpu, or auto (every GPU, else the CPU).",
            rich_help_panel=RUN,
        ),
    ] = "auto",
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List the cells and their sizes, measure nothing.", rich_help_panel=RUN),
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)] = False,
) -> None:
    """Quantize models to every width, type and block, measure each, and say what is on the Pareto front.

    zq sweep demo --bits 3,4,5,6,8 --types int,float,dynamic,quantile --blocks 64,1024 -o sweep-demo

    Cells that OUT/results.jsonl has are not measured again, so the same command continues an interrupted sweep.
    Sizes are bytes as written. Figures, tables and a page are made from all cells in OUT.
    """
    with command(json):
        from zq.sweep.grid import blocks as parse_blocks
        from zq.sweep.grid import data_types, grid, method_of, whole_numbers

        if output is None and not dry_run:
            raise ZqError("no output folder; give one with -o, or use --dry-run")
        widths, kinds = whole_numbers("--bits", bits, 2, 8), data_types(types)
        shared, numbers = parse_blocks(blocks), whole_numbers("--seeds", seeds, 0, MAX_SEED)
        base = _base(recipe, preset, len(numbers))
        check_number("--batch", batch, 1)
        check_number("--windows", windows, 1)
        check_number("--length", length, 2)
        check_number("--start", start, 0, 1)
        if limit is not None:
            check_number("--limit", limit, 1)
        places = _devices(devices)
        names = _tasks(tasks)
        subjects, setting = _subjects(models, text, windows, length, start)
        setting |= {"batch": batch, "tasks": names, "limit": limit, "method": method_of(base)}
        setting |= _environment(places)
        cells, skipped = grid([s.name for s in subjects], widths, kinds, shared, numbers)
        if not cells:
            raise ZqError(f"no cell is left: {skipped[0].what}: {skipped[0].why}")
        for each in skipped:
            note(f"skipped: {each.what}: {each.why}")
        _carry_out(subjects, cells, skipped, base, setting, places, output, dry_run=dry_run, json=json)


def _carry_out(
    subjects: list[Subject],
    cells: list[Cell],
    skipped: list[Skipped],
    base: Recipe,
    setting: dict[str, Any],
    places: list[str],
    output: Path | None,
    *,
    dry_run: bool,
    json: bool,
) -> None:
    from zq.sweep.measure import cell_key
    from zq.sweep.run import Work
    from zq.sweep.store import check_setting, read_rows

    rows = read_rows(output)[0] if output else []
    if output:
        check_setting(rows, setting, output)
    by_name = {subject.name: subject for subject in subjects}
    every = [subject.original for subject in subjects] + cells
    done = {row["key"] for row in rows}
    wanted = [(by_name[cell.model], cell) for cell in sorted(every, key=lambda c: list(by_name).index(c.model))]
    missing = [task for task in wanted if cell_key(*task, base, setting) not in done]
    if dry_run:
        return _show(wanted, missing, skipped, base, setting, len(places), as_json=json)
    assert output is not None
    work = Work(base=base, setting=setting, out=output)
    failed = _measure(missing, work, places, len(wanted), json)
    _report(output, skipped, failed, json)


def _measure(
    missing: list[tuple[Subject, Cell]], work: Work, places: list[str], total: int, quiet: bool
) -> list[tuple[Cell, ZqError]]:
    """Every missing cell with one line each and a bar."""
    import shutil

    from zq.sweep.measure import planned
    from zq.sweep.run import SCRATCH
    from zq.sweep.run import sweep as run
    from zq.sweep.store import Store

    if len(missing) < total:
        note(f"{total - len(missing)} of {total} cells are there already")
    for subject, cell in missing:
        planned(subject, cell, work.base)  # everything wrong with any of them, before the first
    store = Store(work.out)
    if store.torn:
        note(f"the last line of {store.path} was not finished; it was cut off and its cell is measured again")

    def interrupted() -> str:
        shutil.rmtree(work.out / SCRATCH, ignore_errors=True)
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

            return run(missing, work, store, places, show) if missing else []
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


def _base(recipe: str | None, preset: str | None, seeds: int) -> Recipe:
    """What every cell puts its weights into. Raises ZqError."""
    from zq.methods import resolve_all
    from zq.recipe import load, with_preset
    from zq.sweep.grid import NEAREST

    if recipe is None and preset is None:
        if seeds > 1:
            raise ZqError("--seeds: rounding to nearest has nothing random; drop it, or give --recipe or --preset")
        return NEAREST
    base = load(recipe or "w4a16")
    if base.bits is not None:
        raise ZqError(f"{base.where} has a budget of bits, and a sweep sets the width itself; drop 'bits'")
    base = with_preset(base, preset) if preset else base
    resolve_all(base)
    return base


def _devices(text: str) -> list[str]:
    import torch

    if text == "auto":
        return [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    found = []
    for word in text.split(","):
        try:
            found.append(torch_device(word.strip()))
        except ZqError as error:
            raise ZqError(str(error).replace("--device", "--devices")) from None
    return found


def _tasks(text: str | None) -> list[str]:
    from zq.sweep.tasks import check_tasks

    if text is None:
        return []
    names = [word.strip() for word in text.split(",") if word.strip()]
    if not names:
        raise ZqError("--tasks is empty; name some, for example lambada_openai,piqa")
    check_tasks(names)
    return names


def _subjects(
    models: list[str], text: str, windows: int, length: int, start: float
) -> tuple[list[Subject], dict[str, Any]]:
    """The models with their tokens, and what says where these come from. Raises ZqError."""
    import hashlib

    from zq.data import load_text
    from zq.source import resolve
    from zq.sweep.measure import subject

    content = load_text(text)
    folders = [resolve(model, note) for model in models]
    names = [model.rstrip("/").rpartition("/")[2] or model for model in models]
    names = names if len(set(names)) == len(names) else models
    found = [
        subject(name, folder, content, windows, length, start)
        for name, folder in zip(names, folders, strict=True)
    ]
    seen: dict[str, str] = {}
    for each in found:
        if each.identity in seen:
            raise ZqError(f"{seen[each.identity]} and {each.name} are the same model; give each once")
        seen[each.identity] = each.name
    named = Path(text).name if Path(text).is_file() else text
    digest = hashlib.sha256(content.encode()).hexdigest()[:16]
    tokens = {"windows": windows, "length": length, "start": start}
    return found, {"text": f"{named} sha256:{digest}", **tokens}


def _environment(places: list[str]) -> dict[str, Any]:
    """The kind of device and the versions. Raises ZqError when the devices differ."""
    import torch
    import transformers

    import zq

    kinds = {"cpu" if place == "cpu" else torch.cuda.get_device_name(place) for place in places}
    if len(kinds) > 1:
        raise ZqError(f"--devices: {' and '.join(sorted(kinds))} give different figures; take devices of one kind")
    return {
        "device": kinds.pop(),
        "zq": zq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _show(
    wanted: list[tuple[Subject, Cell]],
    missing: list[tuple[Subject, Cell]],
    skipped: list[Skipped],
    base: Recipe,
    setting: dict[str, Any],
    devices: int,
    as_json: bool,
) -> None:
    """The dry run."""
    from zq.sweep.measure import planned, sizes
    from zq.sweep.forecast import seconds

    rows, total = [], 0.0
    for subject, cell in wanted:
        plan = planned(subject, cell, base)
        took = seconds(plan, cell, setting) if (subject, cell) in missing else 0.0
        total += took / devices
        rows.append({"cell": str(cell), "bytes": sizes(plan, cell), "done": took == 0, "seconds": round(took, 1)})
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


def _report(output: Path, skipped: list[Skipped], failed: list[tuple[Cell, ZqError]], json: bool) -> None:
    """Figures, page and findings from all rows in OUT. Raises ZqError when a cell failed."""
    from zq.sweep import plots
    from zq.sweep.report import write_report
    from zq.sweep.store import read_rows

    rows = read_rows(output)[0] if output.exists() else []
    reasons = [(each.what, each.why) for each in skipped] + [(str(cell), str(error)) for cell, error in failed]
    if rows:
        summary = write_report(rows, output, reasons)
        if not plots.is_available():
            note("no figures: matplotlib is not installed; pip install 'zq[plots]' and run the same again")
        if json and not failed:
            return print_json(summary)
        if not json:
            for sentence in summary["findings"]:
                out.print(sentence, soft_wrap=True, markup=False)
            for file in summary["files"]:
                note(file)
    if failed:
        cell, error = failed[0]
        kept = "; the others are kept, and the same command tries these again" if rows else ""
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ZqError(f"{cell}{more}: {error}{kept}")
