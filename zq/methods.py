"""The methods that a recipe can name as steps: one file each, one row here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from zq.distill import lkd
from zq.errors import ZqError
from zq.quantizers import gptq, rotate, rtn
from zq.quantizers.method import Method
from zq.recipe import Step

METHODS: dict[str, Method] = {m.name: m for m in (rotate.METHOD, rtn.METHOD, gptq.METHOD, lkd.METHOD)}


def resolve_steps(steps: Iterable[Step], where: str) -> list[tuple[Method, Any]]:
    """The methods of a recipe's steps and their checked options, in order. Raises ZqError as `resolve`, and
    for a step on the whole model that is not the first."""
    found = []
    for step in steps:
        method, options = resolve(step, where)
        if method.view and found:
            raise ZqError(
                f"{step.where or where}: step '{step.name}' changes the whole model, so it must be the first "
                "step, and given once; move it up or drop it"
            )
        found.append((method, options))
    return found


def resolve(step: Step, where: str) -> tuple[Method, Any]:
    """The method of a recipe step and its checked options. Raises ZqError naming the step's file and line,
    or `where` for a step that was not read from a file."""
    spot = step.where or where
    if step.name not in METHODS:
        raise ZqError(f"{spot}: step '{step.name}' is unknown; allowed: {', '.join(METHODS)}")
    method = METHODS[step.name]
    known = {f.name: f for f in fields(method.options)}
    for key, value in step.options:
        if key not in known:
            raise ZqError(
                f"{spot}: option '{key}' of step '{step.name}' is unknown; allowed: {', '.join(known)}"
            )
        allowed = known[key].metadata.get("allowed")
        if allowed and value not in allowed:
            raise ZqError(f"{spot}: '{key}: {value}' is not allowed; allowed: {', '.join(map(str, allowed))}")
        default = known[key].default
        if default is not MISSING and type(value) is not type(default):
            raise ZqError(f"{spot}: '{key}' must be {type(default).__name__}, not {value!r}")
    return method, method.options(**dict(step.options))
