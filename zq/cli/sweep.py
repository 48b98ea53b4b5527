"""zq sweep: a grid of quantizations, measured, with its Pareto front."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zq.cli.console import MAX_SEED, check_number, command, note, torch_device
from zq.cli.sweep_show import run
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.recipe import Recipe

GRID, EVALUATION, RUN = "Grid", "Evaluation", "Run"


def sweep(  # noqa: PLR0913 (a command line is its options)
    models: Annotated[
        list[str],
        typer.Argument(help="Checkpoint folders, hub ids, or `demo`; for a front over sizes, a family."),
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
            help="Data types: int, float, float-paper, dynamic, linear, nf, quantile, kmeans, or formats "
            "by name.",
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
        str,
        typer.Option(
            "--seeds", help="Seeds of the recipe; figures are means over them.", rich_help_panel=GRID
        ),
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
        float,
        typer.Option("--start", help="Fraction of the text to skip, 0 to 1.", rich_help_panel=EVALUATION),
    ] = 0.0,
    batch: Annotated[
        int, typer.Option("--batch", help="Windows per forward pass.", rich_help_panel=EVALUATION)
    ] = 1,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="Tasks of lm-eval for zero-shot accuracy, for example lambada_openai,piqa; the package "
            "and the data must be on this machine.",
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
        typer.Option(
            "--dry-run", help="List the cells and their sizes, measure nothing.", rich_help_panel=RUN
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Quantize models to every width, type and block, measure each, and say what is on the Pareto front.

    zq sweep demo --bits 3,4,5,6,8 --types int,float,dynamic,quantile -o sweep-demo

    Cells that OUT/results.jsonl has are not measured again, so the same command continues an interrupted
    sweep. Sizes are bytes as written. Figures, tables and a page are made from all cells in OUT.
    """
    with command(json):
        from zq.sweep.grid import blocks as parse_blocks
        from zq.sweep.grid import data_types, grid, method_of, whole_numbers
        from zq.sweep.run import Work
        from zq.sweep.subjects import environment, subjects

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
        found, setting = subjects(models, text, windows, length, start, note)
        setting |= {"batch": batch, "tasks": names, "limit": limit, "method": method_of(base)}
        setting |= environment(places)
        cells, skipped = grid([s.name for s in found], widths, kinds, shared, numbers)
        if not cells:
            raise ZqError(
                f"no cell is left: {skipped[0].what}: {skipped[0].why}; give other --bits or --types"
            )
        work = Work(base=base, setting=setting, devices=places)
        tasks_of = [(s, cell) for s in found for cell in (s.original, *cells) if cell.model == s.name]
        run(tasks_of, skipped, work, output, dry_run=dry_run, as_json=json)


def _base(recipe: str | None, preset: str | None, seeds: int) -> Recipe:
    """What every cell puts its weights into. Raises ZqError."""
    from zq.methods import resolve_all
    from zq.recipe import load, with_preset
    from zq.sweep.grid import NEAREST

    if recipe is None and preset is None:
        if seeds > 1:
            raise ZqError(
                "--seeds: rounding to nearest has nothing random; drop it, or give --recipe or --preset"
            )
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
