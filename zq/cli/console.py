"""What every command shares: consoles, exit codes, errors on one line, JSON on standard output.

Exit codes: 0 done, 1 internal error, 2 bad input, 3 audit failed, 75 interrupted and resumable.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console

from zq.errors import Interrupted, ZqError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


@contextmanager
def command(as_json: bool = False) -> Iterator[None]:
    """Run a command: an error that the user can repair becomes one line and its exit code.

    Anything else is a defect of zq and keeps its traceback (exit code 1).
    """
    signal.signal(signal.SIGTERM, _interrupt)
    _quiet()
    try:
        yield
    except ZqError as error:
        message = " ".join(str(error).split())
        if as_json:
            print_json({"error": message, "exit_code": error.exit_code})
        err.print(f"[bold red]error:[/] {_plain(message)}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        err.print("[bold]interrupted[/]")
        raise typer.Exit(130) from None


@contextmanager
def resumable(hint: str) -> Iterator[None]:
    """Inside, an interruption is not lost work: it says how to continue and exits with 75."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; finished blocks are kept, continue with: {hint}") from None


def print_json(data: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def note(message: str) -> None:
    """A line about what is going on, on standard error."""
    err.print(f"[dim]{_plain(message)}[/]", soft_wrap=True)


def size(count: float) -> str:
    """Bytes for people: 113.1 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
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
    if device is None or device.type not in ("cpu", "cuda"):
        raise ZqError(f"--device {name} is unknown; allowed: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ZqError(f"--device {name}: this machine has {count} CUDA devices; use --device cpu or auto")
    return name


def _plain(text: str) -> str:
    """User text must not be read as rich markup."""
    return text.replace("[", r"\[")


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _quiet() -> None:
    """Libraries keep their progress bars and advice to themselves; ours are on standard error."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
