"""Every failure that a user can cause or repair is one of these; `zq/cli` turns them into exit codes.

A message is one line and says four things: what is wrong, where, what is allowed, what to do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

NO_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")  # in torch's messages


class ZqError(Exception):
    """Bad input: the CLI prints the message without a traceback and exits with `exit_code`."""

    exit_code = 2


class AuditError(ZqError):
    """The written checkpoint does not hold what the run measured."""

    exit_code = 3


class OutputError(ZqError):
    """Writing failed for a reason outside of zq (disk, quota); what is done is kept for `--resume`."""


class OutputKept(OutputError):
    """The same after blocks were finished: they are kept, and `--resume` continues."""

    exit_code = 75


class Interrupted(ZqError):
    """The run was stopped from outside; `--resume` continues it."""

    exit_code = 75


class OutOfMemory(ZqError):
    """The device has less memory than the work needs."""


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Inside, an allocation that fails, in torch or in Python, raises OutOfMemory with this advice."""
    try:
        yield
    except Exception as error:
        wanted = None if isinstance(error, ZqError) else _wanted(error)
        if wanted is None:
            raise
        raise OutOfMemory(f"no memory is left{wanted}; {advice}") from None


def _wanted(error: BaseException | None) -> str | None:
    """How much more an error asked for in vain, in words; None when it is about something else."""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
            found = re.search(r"tried to allocate ([\d.]+) (bytes|[KMGT]iB)", text, re.IGNORECASE)
            if not found:
                return ""
            in_bytes = found[2].lower() == "bytes"
            size = f"{float(found[1]) / 2**30:.2f} GiB" if in_bytes else f"{found[1]} {found[2]}"
            return f" for {size} more"
        error = error.__context__  # the end of a recording fails, too
    return None
