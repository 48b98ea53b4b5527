"""What `zq quantize` shows: a dry run's table, one line per block, a summary."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zq.cli.console import err, facts, listing, note, out, print_json, size
from zq.cli.kernels import bundle_line

if TYPE_CHECKING:
    from zq.plan import Plan


def measuring(quiet: bool) -> Callable[[dict[str, Any]], None]:
    """One line per block while sensitivities are measured, the last block first."""

    def show(event: dict[str, Any]) -> None:
        left = event["seconds"] * (event["of"] - event["done"])
        if not quiet:
            err.print(
                f"{event['measured']:<28}  sensitivity measured  "
                f"[dim]{event['seconds']:.1f} s, ETA {left:.0f} s[/]",
                soft_wrap=True,
            )

    return show


def command_line() -> str:
    """What makes this output from nothing: a resumed run gives the same files as the first."""
    return shlex.join(["zq", *(word for word in sys.argv[1:] if word != "--resume")])


def carry_out(plan: Plan, output: Path, resume: bool, quiet: bool) -> dict[str, Any]:
    """The pipeline with one line per block and a bar with the time that is left."""
    from zq.pipeline import quantize as run

    for line in plan.notes:
        note(line)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=quiet or not err.is_terminal) as bar:
        task = bar.add_task("blocks", total=len(plan.units))
        begun = time.monotonic()
        done = 0

        def show(event: dict[str, Any]) -> None:
            nonlocal done
            if "written" in event:
                bar.update(task, description=f"writing {event['written']}/{event['of']}")
                return
            bar.update(task, description="blocks")
            if "calibration" in event:
                return None if quiet else note(_tokens(event["calibration"]))
            done += 1
            bar.advance(task)
            if quiet:
                return
            left = (time.monotonic() - begun) / done * (len(plan.units) - event["done"])
            err.print(_line(event, left), soft_wrap=True)

        return run(plan, output, resume=resume, progress=show, command=command_line()).report


def _tokens(facts: dict[str, Any]) -> str:
    """What the calibration tokens are."""
    count, distinct, often = facts["tokens"], facts["distinct"], facts["most_frequent_share"]
    source = "" if facts["source"] == "none" else f" from {facts['source']}"
    written = f", {facts['generated']['windows']} written by the model" if "generated" in facts else ""
    return (
        f"calibration: {facts['windows']} windows of {facts['length']} tokens{source}{written}; "
        f"{count} tokens, {distinct} distinct ({distinct / facts['vocabulary']:.1%} of the vocabulary), "
        f"the most frequent {often:.1%} of them; seed {facts['seed']}"
    )


def _line(event: dict[str, Any], left: float) -> str:
    layers = event["layers"].values()
    parts = [f"{event['unit']:<28}"]
    if layers:
        worst = min(m["sqnr_db"] for m in layers)
        parts.append(f"{len(layers)} layers, worst {worst:5.2f} dB")
    else:
        parts.append("copied                   ")
    if "output_error" in event:
        parts.append(f"output error {_known(event['output_error'])}")
    if "smoothing" in event:
        parts.append(_smoothing(event["smoothing"]))
    for fact, what in (("held_out_loss", "held-out loss"), ("training_loss", "training loss")):
        if fact in event:
            parts.append(f"{what} {_known(event[fact]['start'])} -> {_known(event[fact]['end'])}")
    parts.append(f"[dim]{event['seconds']:.1f} s, ETA {left:.0f} s[/]")
    return "  ".join(parts)


def _known(value: float | None) -> str:
    return "unknown: overflow" if value is None else f"{value:.2e}"


def _smoothing(links: list[dict[str, Any]]) -> str:
    """What the steps that fold scales did; the errors of their links, one at a time, added up."""
    said = []
    for step in dict.fromkeys(link["step"] for link in links):
        chosen = [link for link in links if link["step"] == step]
        errors = [(link["start"], link["end"]) for link in chosen if link.get("start") and link.get("end")]
        before, after = (sum(pair[i] for pair in errors) for i in (0, 1))
        gain = f" {before:.2e} -> {after:.2e}" if errors else f" {len(chosen)} links"
        said.append(step + gain)
    return ", ".join(said)


def show_plan(plan: Plan, as_json: bool) -> None:
    from zq.estimate import estimate

    guess = estimate(plan)
    rows = plan.rows()
    if as_json:
        chosen = {"sensitivity": plan.sensitivity} if plan.sensitivity else {}
        return print_json({"format": plan.format, "notes": plan.notes, "tensors": rows, **chosen, **guess})
    listing(
        ("tensor", "shape", "becomes", "why", "bytes"),
        [
            (row["name"], "x".join(map(str, row["shape"])), row["becomes"], row["why"], size(row["bytes"]))
            for row in rows
        ],
    )
    for line in plan.notes:
        out.print(f"note: {line}", soft_wrap=True)
    out.print(
        f"format {plan.format}; {size(guess['bytes_before'])} -> {size(guess['bytes_after'])}, "
        f"{guess['bits_per_weight']:.3f} bits per quantized weight; about {size(guess['memory'])} of memory, "
        f"{size(guess['disk'])} of disk and {guess['seconds']:.0f} s; nothing was written",
        soft_wrap=True,
    )


def summary(plan: Plan, report: dict[str, Any], model: str) -> None:
    """`model`: the source, as the user calls it."""
    table = facts()
    table.add_row("output", report["output"])
    table.add_row("format", report["format"])
    if "gguf" in report:
        kinds = ", ".join(f"{count} layers {kind}" for kind, count in report["gguf"]["types"].items())
        table.add_row("for llama.cpp", f"{report['gguf']['file']}: {size(report['gguf']['bytes'])}, {kinds}")
    before, after = report["bytes_before"], report["bytes_after"]
    table.add_row("size", f"{size(before)} -> {size(after)} ({before / after:.2f}x smaller)")
    table.add_row("bits per weight", f"{report['bits_per_weight']:.3f}, as written, quantized layers")
    for kind, decibels in report["weight_sqnr_db"].items():
        table.add_row(f"{kind} weights", f"{decibels:.2f} dB SQNR, mean")
    if report["output_error"]:
        last = list(report["output_error"].values())[-1]
        known = "unknown" if last is None else f"{last:.3e}"
        table.add_row("output error", f"{known} after the last block (relative, squared)")
    for line in report["notes"][len(plan.notes) :]:  # the others were said at the start
        table.add_row("note", line)
    if "kernels" in report:
        table.add_row("kernels", bundle_line(Path(report["output"]), report["kernels"]))
    audit = report["audit"]
    table.add_row(
        "audit", f"passed: {audit['tensors']} tensors, {audit['quantized_layers']} quantized layers"
    )
    table.add_row("time", f"{report['seconds_total']:.1f} s")
    table.add_row("peak memory", size(report["peak_memory"]))
    out.print(table)
    out.print(
        "next: " + shlex.join(["zq", "eval", report["output"], "--against", model]),
        style="dim",
        soft_wrap=True,
    )
