"""zq quantize: from a checkpoint and a recipe to a smaller checkpoint."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zq.cli.console import (
    MAX_SEED,
    check_number,
    command,
    note,
    peak_memory,
    print_json,
    torch_device,
)
from zq.cli.doctor import check
from zq.cli.kernels import planned, write_bundle
from zq.cli.show import carry_out, command_line, measuring, show_plan, summary
from zq.cli.signals import resumable
from zq.errors import ZqError
from zq.kernels.unit import parse_archs

if TYPE_CHECKING:
    from zq.plan import Plan
    from zq.recipe import Recipe

SHORTCUTS = ("w8a8", "w4a8", "w4a8-two-level", "w4a16", "w8a16", "fp8", "fp8-block", "w4afp8", "w4w8a8")
MIN_SHARD = 0.0001  # GB; below, a checkpoint would be one file per tensor
SCHEMES = "Scheme (one of them, or --recipe)"
RUN = "Run"


def _shortcut(name: str, text: str) -> Any:
    return typer.Option(f"--{name}", help=text, rich_help_panel=SCHEMES)


def quantize(  # noqa: PLR0913 (a command line is its options)
    model: Annotated[str, typer.Argument(help="A checkpoint folder, a Hugging Face hub id, or `demo`.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to create. Needed unless --dry-run.")
    ] = None,
    w8a8: Annotated[bool, _shortcut("w8a8", "INT8 weights, INT8 activations.")] = False,
    w4a8: Annotated[bool, _shortcut("w4a8", "INT4 weights in groups, INT8 activations.")] = False,
    w4a8_two_level: Annotated[
        bool, _shortcut("w4a8-two-level", "w4a8 on the grid of the fastest INT8 kernel.")
    ] = False,
    w4a16: Annotated[bool, _shortcut("w4a16", "INT4 weights in groups.")] = False,
    w8a16: Annotated[bool, _shortcut("w8a16", "INT8 weights.")] = False,
    fp8: Annotated[bool, _shortcut("fp8", "FP8 e4m3 weights and activations.")] = False,
    fp8_block: Annotated[
        bool, _shortcut("fp8-block", "FP8 weights in tiles of 128x128, FP8 activations in groups of 128.")
    ] = False,
    w4afp8: Annotated[bool, _shortcut("w4afp8", "INT4 weights in groups, FP8 activations.")] = False,
    w4w8a8: Annotated[
        bool, _shortcut("w4w8a8", "INT4 feed-forward, INT8 attention, INT8 activations.")
    ] = False,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="A shipped recipe by name or a .yaml file.", rich_help_panel=SCHEMES),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            help="How to quantize: nearest (seconds), quick (minutes on a CPU), best (a GPU). Default: the "
            "recipe's steps; see `zq recipes`.",
        ),
    ] = None,
    group_size: Annotated[
        str,
        typer.Option(
            "--group-size",
            help="Weights that share a scale. auto: what the recipe says; there, `gauto` is the largest of "
            "128, 64 and 32 that divides every input size.",
        ),
    ] = "auto",
    bits: Annotated[
        float | None,
        typer.Option(
            "--bits",
            help="Mean bits per quantized weight, scales included: every group of layers that read one input "
            "gets 4 or 8 bits, by what it measurably costs. Other widths: `bits` in a recipe.",
        ),
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(
            "--calib",
            help="Calibration text: bundled, random, none, a file, or hf:DATASET. Default: the recipe's.",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Windows of calibration text. Default: the recipe's.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", help="Tokens per calibration window. Default: the recipe's.")
    ] = None,
    generated: Annotated[
        int | None,
        typer.Option(
            "--generated",
            help="Further calibration windows that the model writes itself. Default: the recipe's.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Output format: auto (compressed-tensors where that can hold it), compressed-tensors, gptq, "
            "awq, fp8, zq, or gguf: zq's own and beside it a file for llama.cpp. Default: the recipe's.",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="What will serve it: ENGINE[:VERSION][:smNN or cpu][:tp=N]. The plan is checked against "
            "what that engine really does; may be given several times. See `zq doctor`.",
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Default: the recipe's.")] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.", rich_help_panel=RUN)
    ] = "auto",
    shard_size: Annotated[
        float, typer.Option("--shard-size", help="Largest output file in GB.", rich_help_panel=RUN)
    ] = 5.0,
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            help="Put zq's CUDA kernels for these architectures (such as sm_80,sm_90a, or all) beside the "
            "weights, as `zq kernels bundle` does.",
            rich_help_panel=RUN,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole plan and write nothing.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run.", rich_help_panel=RUN)
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=RUN)
    ] = False,
) -> None:
    """Quantize a checkpoint into a new folder that transformers and vLLM load.

    zq quantize demo --w4a8 -o smol-w4a8

    Every layer is planned before work begins, written atomically, and read back and compared at the end.
    """
    flags = {"w8a8": w8a8, "w4a8": w4a8, "w4a16": w4a16, "w8a16": w8a16, "fp8": fp8, "w4afp8": w4afp8}
    flags |= {"w4a8-two-level": w4a8_two_level, "fp8-block": fp8_block, "w4w8a8": w4w8a8}
    with command(json):
        started = time.monotonic()
        wanted = {"source": calib, "samples": samples, "length": length, "generated": generated}
        asked = _with_bits(_recipe(flags, recipe, preset, group_size, wanted, seed), bits)
        _with_format(asked, to)  # an unknown one is refused before any work
        if output is None and not dry_run:
            raise ZqError("no output folder; give one with -o, or use --dry-run")
        check_number("--shard-size", shard_size, MIN_SHARD, 1_000_000)
        archs = parse_archs(kernels) if kernels else ()
        if output is not None and not dry_run:
            _check_output(output, resume)
        from zq.engines import parse
        from zq.source import resolve as resolve_model

        for text in engine or ():
            parse(text)
        folder = resolve_model(model, note)
        options = {"shard_bytes": int(shard_size * 1e9), "device": torch_device(device)}
        resumed = output if resume and not dry_run else None
        plan = _planned(folder, asked, to, options, resumed, quiet=json)
        # Another format's plan costs little, unless its bits have to be measured again.
        again = None if asked.bits else lambda other: _planned(folder, asked, other, options)
        for text in engine or ():
            plan.notes.extend(check(plan, text, to == "gguf", again))
        if dry_run:
            return show_plan(plan, as_json=json)
        assert output is not None
        # Compiled now: a failure comes before the work.
        units = planned(plan, archs, quiet=json) if archs else []
        with resumable(output, f"{command_line()} --resume", as_json=json):
            report = carry_out(plan, output, resume, quiet=json)
        if to == "gguf":
            from zq import llamacpp

            report["gguf"] = llamacpp.write(output, output / llamacpp.FILE)
            report["notes"] += report["gguf"]["notes"]
        report |= {"output": str(output), "peak_memory": peak_memory()}
        if units:
            report["kernels"] = write_bundle(output, units, archs, quiet=True)
        report["seconds_total"] = round(time.monotonic() - started, 2)
        if json:
            print_json({k: v for k, v in report.items() if k not in ("layers", "tensors")})
        else:
            summary(plan, report, model)


def _recipe(
    flags: dict[str, bool],
    name: str | None,
    preset: str | None,
    group_size: str,
    calibration: dict[str, str | int | None],
    seed: int | None,
) -> Recipe:
    """The recipe that the options ask for; `calibration` holds what replaces the recipe's unless it is None.
    Raises ZqError unless it is exactly one."""
    from zq.recipe import MOST, load, with_preset

    wanted = [flag for flag, on in flags.items() if on] + ([name] if name else [])
    if len(wanted) != 1:
        asked = f"{len(wanted)} schemes ({', '.join(wanted)})" if wanted else "no scheme"
        options = ", ".join(f"--{shortcut}" for shortcut in SHORTCUTS)
        raise ZqError(f"{asked} given; give exactly one of {options} or --recipe")
    recipe = load(wanted[0])
    if preset is not None:
        recipe = with_preset(recipe, preset)
    if group_size != "auto":
        if not re.fullmatch("[0-9]{1,7}", group_size) or int(group_size) < 2:
            raise ZqError(f"--group-size {group_size} is not allowed; give auto or a whole number from 2 on")
        if not any(rule.scheme and rule.scheme.weights.layout.kind == "group" for rule in recipe.rules):
            raise ZqError(f"--group-size {group_size}: {recipe.where} has no groups of weights; drop it")
        recipe = recipe.with_group_size(int(group_size))
    given = {key: value for key, value in calibration.items() if value is not None}
    for key, value in given.items():
        if isinstance(value, int):
            check_number(f"--{key}", value, 0 if key == "generated" else 1, MOST)
    recipe = replace(recipe, calibration=replace(recipe.calibration, **given))  # type: ignore[arg-type]
    if seed is None:
        return recipe
    check_number("--seed", seed, 0, MAX_SEED)
    return replace(recipe, seed=seed)


def _with_bits(recipe: Recipe, mean: float | None) -> Recipe:
    """The recipe with another budget, of the same widths."""
    from zq.recipe import Bits

    if mean is None:
        return recipe
    check_number("--bits", mean, 1, 32)
    return replace(recipe, bits=replace(recipe.bits or Bits(mean=mean), mean=mean, where="--bits"))


def _with_format(recipe: Recipe, to: str | None) -> Recipe:
    """The recipe with another output format. A GGUF file is made from a checkpoint in zq's own."""
    from zq.recipe import OUTPUT_FORMATS

    if to is not None and to not in (*OUTPUT_FORMATS, "gguf"):
        raise ZqError(f"--to {to} is unknown; allowed: {', '.join((*OUTPUT_FORMATS, 'gguf'))}")
    if to == "gguf":
        from zq.export.ggml import adapt

        rules = tuple(replace(r, scheme=r.scheme and adapt(r.scheme)) for r in recipe.rules)
        return replace(recipe, rules=rules, format="zq")
    return replace(recipe, format=to) if to else recipe


def _planned(
    folder: Path,
    recipe: Recipe,
    to: str | None,
    options: dict[str, Any],
    resume: Path | None = None,
    *,
    quiet: bool = True,
) -> Plan:
    """The plan, its bits chosen. Raises ZqError for what the format cannot hold."""
    from zq.plan import make_plan

    plan = make_plan(folder, _with_format(recipe, to), **options)
    if plan.recipe.bits:
        plan = _settled(plan, to, resume, quiet)
    if to == "gguf":
        from zq import llamacpp

        shapes = {layer.name: layer.shape for layer in plan.layers}
        llamacpp.refuse(plan.assigned, shapes, folder)
    return plan


def _settled(plan: Plan, to: str | None, resume: Path | None, quiet: bool) -> Plan:
    """The plan with a width for every site; one that `to` cannot hold is refused before any is measured."""
    from zq import llamacpp
    from zq.autobits import offered, settle

    for schemes in offered(plan) if to == "gguf" else []:
        shapes = {layer.name: layer.shape for layer in plan.layers}
        llamacpp.refuse(schemes, shapes, plan.folder)
    return settle(plan, resume=resume, progress=measuring(quiet))


def _check_output(output: Path, resume: bool) -> None:
    """What can be said about the output before the model is even looked at."""
    from zq.checkpoint.job import check_output

    if not resume:
        check_output(output)
