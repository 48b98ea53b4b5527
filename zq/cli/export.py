"""zq export: a quantized checkpoint in another format, with the same values."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from zq.cli.console import check_number, command, err, facts, note, out, print_json, size
from zq.cli.quantize import MIN_SHARD
from zq.errors import ZqError


def export(
    checkpoint: Annotated[
        str, typer.Argument(help="A quantized checkpoint, for gguf any: a folder or a hub id.")
    ],
    to: Annotated[str, typer.Option("--to", help="compressed-tensors, gptq, awq, fp8, zq or gguf.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder to create; for gguf the file, NAME.gguf.")
    ],
    shard_size: Annotated[
        float, typer.Option("--shard-size", help="Largest output file in GB; a GGUF is always one file.")
    ] = 5.0,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a quantized checkpoint in another format, without quantizing again.

    Every weight keeps its exact value; a checkpoint that the other format cannot hold is refused.
    """
    with command(json):
        check_number("--shard-size", shard_size, MIN_SHARD, 1_000_000)
        from zq.source import resolve

        folder = resolve(checkpoint, note)
        from zq.checkpoint.job import check_output
        from zq.convert import convert, plan_conversion
        from zq.export import EXPORTERS

        if to == "gguf":
            return _gguf(folder, output, json)
        if to not in EXPORTERS:
            raise ZqError(f"format '{to}' is unknown; allowed: {', '.join(EXPORTERS)}, gguf")
        check_output(output)
        plan = plan_conversion(folder, to)
        if plan.source is plan.target:
            raise ZqError(f"{folder} is in format {to} already; copy the folder")
        with Progress(console=err, transient=True, disable=json or not err.is_terminal) as bar:
            task = bar.add_task("layers", total=len(plan.before))
            report = convert(
                plan,
                output,
                shard_bytes=int(shard_size * 1e9),
                command=shlex.join(["zq", *sys.argv[1:]]),
                progress=lambda done, total: bar.update(task, completed=done),
            )
        for line in report["notes"]:
            note(line)
        if json:
            return print_json({k: v for k, v in report.items() if k != "tensors"} | {"output": str(output)})
        table = facts()
        table.add_row("output", str(output))
        table.add_row("format", report["format"])
        table.add_row("schemes", ", ".join(report["schemes"]))
        table.add_row("size", f"{size(report['bytes_before'])} -> {size(report['bytes_after'])}")
        table.add_row("audit", f"passed: {len(plan.before)} layers have the same values")
        out.print(table)


def _gguf(folder: Path, output: Path, as_json: bool) -> None:
    from zq.llamacpp import write

    if output.suffix != ".gguf":
        raise ZqError(f"{output} is no name of a GGUF file; give -o NAME.gguf")
    try:
        exists = output.exists() or output.is_symlink()
    except OSError as error:  # a name that is too long, a folder that may not be searched
        raise ZqError(f"cannot use output {output}: {error.strerror}; choose another -o") from None
    if exists:
        raise ZqError(f"{output} exists; choose another name or delete it")
    if not output.absolute().parent.is_dir():
        raise ZqError(f"there is no folder {output.parent} for {output.name}; create it or choose another")
    with Progress(console=err, transient=True, disable=as_json or not err.is_terminal) as bar:
        task = bar.add_task("tensors", total=None)
        report = write(folder, output, lambda done, total: bar.update(task, completed=done, total=total))
    for line in report["notes"]:
        note(line)
    if as_json:
        return print_json(report)
    table = facts()
    table.add_row("output", report["file"])
    table.add_row("types", ", ".join(f"{count} layers {kind}" for kind, count in report["types"].items()))
    table.add_row("size", size(report["bytes"]))
    out.print(table)
