"""Rows with their ratios, the environment, and the JSON file, written anew with every row."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

import zq
from zq.checkpoint.writer import disk_error
from zq.errors import ZqError

TIMES = {"decode": ("prefill_ms", "ms_per_token"), "prefill": ("prefill_ms",), "encode": ("ms_per_batch",)}
RATES = {"decode": "tokens_per_s", "prefill": "tokens_per_s", "encode": "sequences_per_s"}
Row = dict[str, Any]


def environment(device: str, commit: str | None = None) -> dict[str, Any]:
    """Device, versions, and the commit of zq where it is known."""
    cuda = device.startswith("cuda")
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "zq": zq.__version__,
        "commit": commit or _commit(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return found | ({"cuda": torch.version.cuda} if cuda else {"threads": torch.get_num_threads()})


def with_ratios(rows: Sequence[Row], mode: str) -> list[Row]:
    """The same rows, each with "faster": {baseline: {figure: time of the baseline / own time}} for every
    other engine, not zq, that was measured with the same batch; and "smaller": {baseline: its peak memory /
    own}."""
    done = []
    for row in rows:
        others = [
            other
            for other in rows
            if other["batch"] == row["batch"]
            and other["engine"] not in ("zq", row["engine"])
            and "error" not in other
        ]
        if "error" in row or not others:
            done.append(row)
            continue
        faster = {o["engine"]: {name: _ratio(o[name], row[name]) for name in TIMES[mode]} for o in others}
        smaller = {o["engine"]: _ratio(o["memory"]["peak"], row["memory"]["peak"]) for o in others}
        done.append({**row, "faster": faster, "smaller": smaller})
    return done


def _ratio(a: float | None, b: float | None) -> float | None:
    return round(a / b, 3) if a is not None and b is not None and a > 0 and b > 0 else None


class Results:
    """All there is: {"setting", "environment", "rows", "complete"}, and the file that holds it (None: none).
    complete: whether every row that was asked for is there."""

    def __init__(self, setting: dict[str, Any], environment: dict[str, Any], file: Path | None) -> None:
        """Raises ZqError when the file could not be written."""
        self.setting, self.environment, self.file = setting, environment, file
        self.rows: list[Row] = []
        self.complete = False
        if file is not None and (file.is_dir() or not os.access(file.parent, os.W_OK | os.X_OK)):
            raise ZqError(f"--json {file}: cannot be written; give a file in a folder that is there")

    def add(self, row: Row) -> None:
        self.rows = with_ratios([*self.rows, row], self.setting["mode"])
        self.write()

    def finish(self) -> None:
        self.complete = not any("error" in row for row in self.rows)
        self.write()

    def to_dict(self) -> dict[str, Any]:
        parts = {"setting": self.setting, "environment": self.environment}
        return {**parts, "complete": self.complete, "rows": self.rows}

    def write(self) -> None:
        """The file has all of this, or all of what it had before; nothing before the first figure."""
        if self.file is None or all("error" in row for row in self.rows):
            return
        text = json.dumps(_finite(self.to_dict()), indent=1) + "\n"
        try:
            handle, name = tempfile.mkstemp(dir=self.file.parent, prefix=f".{self.file.name}.")
        except OSError as error:
            raise disk_error(error, self.file, len(text)) from None
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as opened:
                opened.write(text)
            os.replace(name, self.file)
        except OSError as error:
            raise disk_error(error, self.file, len(text)) from None
        finally:
            with suppress(OSError):
                os.unlink(name)


def _finite(data: Any) -> Any:
    if isinstance(data, dict):
        return {key: _finite(value) for key, value in data.items()}
    if isinstance(data, list):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _processor() -> str:
    """The processor as Linux names it, with its cores."""
    name = platform.machine()
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Of the folder that zq is run from, where that is a git checkout; "+" where files were changed since."""
    root = Path(zq.__file__).parent.parent
    if not (root / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(root)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
