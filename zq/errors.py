"""Every failure that a user can cause or repair is one of these; `zq/cli` turns them into exit codes.

A message is one line and says four things: what is wrong, where, what is allowed, what to do.
"""

from __future__ import annotations


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
