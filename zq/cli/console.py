"""What every command shares: consoles, exit codes, errors on one line, JSON on standard output.

`EXIT_CODES` is the one list of what a command can end with.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from zq.cli.signals import watched
from zq.errors import ZqError, enough_memory
from zq.finite import finite

EXIT_CODES = {
    0: "done",
    1: "internal error",
    2: "bad input",
    3: "audit failed",
    75: "interrupted and resumable",
    130: "interrupted with nothing to resume",
}
MAX_SEED = (1 << 63) - 1  # what torch takes
out = Console(highlight=False, markup=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def command(as_json: bool = False) -> Iterator[None]:
    """Run a command: an error that the user can repair becomes one line and its exit code.

    Anything else is a defect of zq and keeps its traceback (exit code 1).
    """
    _quiet()
    with watched() as watch:
        try:
            with enough_memory("work on less at once, or take another --device"):
                yield
        except (Exception, KeyboardInterrupt) as error:
            if watch.seen or isinstance(error, KeyboardInterrupt):
                err.print("[bold]interrupted[/]")
                raise typer.Exit(130) from None
            if not isinstance(error, ZqError):
                raise
            message = " ".join(str(error).split())
            if as_json:
                print_json({"error": message, "exit_code": error.exit_code})
            fail(message)
            raise typer.Exit(error.exit_code) from None


def print_json(data: Any) -> None:
    """One JSON document on standard output. Infinite and undefined numbers are null: JSON has none."""
    sys.stdout.write(json.dumps(finite(data), indent=1, ensure_ascii=False) + "\n")


def fail(message: str) -> None:
    """The one line about an error, on standard error."""
    err.print(f"[bold red]error:[/] {_plain(' '.join(message.split()))}", soft_wrap=True)


def check_number(option: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ZqError unless low <= value <= high and value is finite."""
    if not low <= value <= high or value == math.inf:
        allowed = f"from {low:g} to {high}" if math.isfinite(high) else f"{low:g} or more"
        raise ZqError(f"{option} {value} is not allowed; give {allowed}")


def note(message: str) -> None:
    """A line about what is going on, on standard error."""
    err.print(f"[dim]{_plain(message)}[/]", soft_wrap=True)


def facts() -> Table:
    """An empty table of two columns, name and value; long values go on in the next line."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def listing(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose cells are never shortened, however narrow the terminal: names are there to be found."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row, style in ((header, "bold"), *((row, None) for row in rows)):
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), style=style, soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people: 113.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    Linux counts in ru_maxrss what a parent process held before it became this one; VmHWM does not.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def torch_device(name: str) -> str:
    """The device that an option names. Raises ZqError when this machine has no such device."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.cuda.device_count()
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cpu" and name != "cpu"):
        raise ZqError(f"--device {name} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ZqError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu or auto")
    return name


def _plain(text: str) -> str:
    """User text must not be read as rich markup."""
    return text.replace("[", r"\[")


def _quiet() -> None:
    """Libraries keep their progress bars and advice to themselves; ours are on standard error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # one line in the end, not one for each try
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
