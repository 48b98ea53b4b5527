"""zq bench: how fast a checkpoint is, and how much memory it takes, beside its original."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zq.cli.bench_show import Wanted, run
from zq.cli.console import check_number, command, note, torch_device
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.bench.subject import Subject

WHAT, LOAD, OUT = "What is measured", "Work", "Results"
SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def bench(  # noqa: PLR0913 (a command line is its options)
    checkpoint: Annotated[
        str | None, typer.Argument(help="A checkpoint folder, a hub id, or `demo`. Or give --shape.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            help="The original, to compare with; `random`: the same config with random weights in bfloat16.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            "--shape",
            help="No checkpoint but random weights in the shape of a well-known model, such as llama-3-8b or "
            "bert-base.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    layers: Annotated[
        int | None, typer.Option("--layers", help="Blocks of the --shape.", rich_help_panel=WHAT)
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            help='Of the --shape: a recipe such as w4a8, or a scheme such as "int4:g128 @ int8:token".',
            rich_help_panel=WHAT,
        ),
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            help="decode (a prompt, then tokens), prefill (the prompt alone) or encode. Default: decode, for "
            "encoders encode.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    batch: Annotated[
        str, typer.Option("--batch", help="Batch sizes, separated by commas.", rich_help_panel=LOAD)
    ] = "1,8",
    length: Annotated[
        int,
        typer.Option("--length", "--prompt", help="Tokens in each row of a batch.", rich_help_panel=LOAD),
    ] = 128,
    new: Annotated[
        int, typer.Option("--new", help="Tokens to generate after them.", rich_help_panel=LOAD)
    ] = 64,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.", rich_help_panel=LOAD)
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="bf16, fp16 or fp32. Default: as stored; bf16 for random weights.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile",
            help="Also measure the original under torch.compile. Default: on CUDA.",
            rich_help_panel=LOAD,
        ),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option("--seconds", help="Repeat each measurement for this long.", rich_help_panel=LOAD),
    ] = 2.0,
    limit: Annotated[
        float | None,
        typer.Option(
            "--limit", help="Stop after this many seconds, with what there is.", rich_help_panel=LOAD
        ),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also say which kernels a step runs.", rich_help_panel=OUT),
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="File for all figures; written with every row.", rich_help_panel=OUT),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="File for a figure: .png, .svg, .pdf.", rich_help_panel=OUT)
    ] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the table as markdown.", rich_help_panel=OUT)
    ] = False,
    commit: Annotated[
        str | None,
        typer.Option(
            "--commit", help="Of zq, to note in the JSON where git cannot say.", rich_help_panel=OUT
        ),
    ] = None,
) -> None:
    """Measure latency, throughput and memory, beside the original in transformers, eager and compiled.

    zq bench demo-w4a8 --against demo

    zq bench --shape llama-3-8b --scheme w4a8 --batch 1,16 --json llama.json

    Each engine runs in a process of its own; figures are medians of runs after warm-up (docs/bench.md).
    """
    with command():
        from zq.bench.task import Task
        from zq.sweep.grid import whole_numbers

        for option, value in (("--layers", layers), ("--length", length), ("--new", new)):
            if value is not None:
                check_number(option, value, 1)
        check_number("--seconds", seconds, 0)
        if limit is not None:
            check_number("--limit", limit, 1)
        batches = whole_numbers("--batch", batch, 1, 65536)
        place = torch_device(device)
        subject = _subject(checkpoint, against, shape, layers, scheme, _dtype(dtype))
        task = Task(
            mode=_mode(subject, mode, length, new),
            length=length,
            new=new,
            device=place,
            seconds=seconds,
            profile=profile,
        )
        if compiled and subject.against is None:
            raise ZqError("--compile compiles the original; give it with --against, or --against random")
        engines = ["zq", *(["eager"] if subject.against else [])]
        if subject.against and (place.startswith("cuda") if compiled is None else compiled):
            engines.append("compiled")
        wanted = Wanted(limit=limit, json=json, plot=plot, markdown=markdown, commit=commit)
        run(subject, task, engines, batches, wanted)


def _subject(
    checkpoint: str | None,
    against: str | None,
    shape: str | None,
    layers: int | None,
    scheme: str | None,
    dtype: str | None,
) -> Subject:
    from zq.bench.subject import RANDOM, Subject
    from zq.source import resolve

    if (checkpoint is None) == (shape is None):
        raise ZqError("give either a checkpoint or --shape, for example --shape llama-3-8b --scheme w4a8")
    if checkpoint is None:
        if scheme is None:
            raise ZqError("--shape needs --scheme, for example w4a8; `zq recipes` lists them")
        if against not in (None, RANDOM):
            raise ZqError("--shape is compared with random weights; drop --against")
        subject = Subject(shape=str(shape), layers=layers, scheme=scheme, against=RANDOM, dtype=dtype)
    else:
        for option, value in (("--scheme", scheme), ("--layers", layers)):
            if value is not None:
                raise ZqError(f"{option} belongs to --shape; a checkpoint has its own")
        original = against if against in (None, RANDOM) else str(resolve(str(against), note))
        subject = Subject(folder=resolve(checkpoint, note), against=original, dtype=dtype)
    subject.check()
    return subject


def _mode(subject: Subject, mode: str | None, length: int, new: int) -> str:
    from zq.bench.task import MODES

    encoder = subject.is_encoder
    mode = mode or ("encode" if encoder else "decode")
    if mode not in MODES:
        raise ZqError(f"--mode {mode} is unknown; allowed: {', '.join(MODES)}")
    if encoder != (mode == "encode"):
        kind, other = ("an encoder", "encode") if encoder else ("a decoder", "decode or prefill")
        raise ZqError(f"--mode {mode}: {subject.folder or subject.shape} is {kind}; use --mode {other}")
    needed = length + (new + 1 if mode == "decode" else 0)
    positions = subject.positions
    if positions is not None and needed > positions:
        raise ZqError(
            f"{subject.folder or subject.shape} has {positions} positions, and --length {length} needs "
            f"{needed}" + (f" with --new {new}" if mode == "decode" else "") + "; shorten them"
        )
    return mode


def _dtype(name: str | None) -> str | None:
    if name is None:
        return None
    full = SHORT.get(name, name)
    if full not in SHORT.values():
        raise ZqError(f"--dtype {name} is unknown; allowed: {', '.join(SHORT)}")
    return full
