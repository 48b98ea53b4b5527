"""Run zq as a user does: `run` in this process (fast), `spawn` as a process of its own (real)."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What a child needs to import this very checkout, one thread like the other tests, and no network.
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(
        filter(None, [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH")])
    ),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "200",
}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as one strict JSON document (NaN and Infinity are no JSON)."""

        def refuse(constant: str) -> None:
            raise ValueError(f"{constant} is not JSON")

        return json.loads(self.out, parse_constant=refuse)

    def ok(self) -> Done:
        """This, when the command succeeded."""
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        return self


def run(*args: str | Path, env: dict[str, str] | None = None) -> Done:
    """`zq ARGS` inside this process, through the entry point of the console script."""
    from zq.cli import console
    from zq.cli.main import main

    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    kept = dict(os.environ)
    sys.argv = ["zq", *map(str, args)]
    os.environ.update({"COLUMNS": "200", **(env or {})})
    for each in (console.out, console.err):  # rich reads COLUMNS once, when a console is made
        each.width = int(os.environ["COLUMNS"])
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as exit_:
                code = exit_.code
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(kept)
    return Done(int(code or 0), out.getvalue(), err.getvalue())


def start(*args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> subprocess.Popen:
    """`python -m zq ARGS` as a child whose output is kept in pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "zq", *map(str, args)],
        cwd=cwd,
        env={**ENVIRONMENT, **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has children ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def spawn(*args: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Done:
    """`python -m zq ARGS` to its end."""
    child = start(*args, cwd=cwd, env=env)
    out, err = child.communicate(timeout=120)
    return Done(child.returncode, out, err)
