"""The methods that a recipe can name as steps: one file each, one row here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from zq.distill import lkd
from zq.errors import ZqError
from zq.quantizers import gptq, lorc, rtn
from zq.quantizers.method import Method
from zq.recipe import Recipe, Step

METHODS: dict[str, Method] = {m.name: m for m in (rtn.METHOD, gptq.METHOD, lkd.METHOD, lorc.METHOD)}


def resolve_all(recipe: Recipe) -> list[tuple[Method, Any]]:
    """The steps of a recipe, each as `resolve` has it. Raises ZqError also for an order that makes no sense:
    a correction of what quantization left comes after it, once, and nothing may change the codes later."""
    names = [step.name for step in recipe.steps]
    for place, step in enumerate(recipe.steps):
        if step.name == lorc.METHOD.name and (place == 0 or names[place:] != [step.name]):
            raise ZqError(
                f"{step.where or recipe.where}: step 'lorc' corrects what the steps before it left; put it "
                "once, as the last step, after rtn or gptq"
            )
    return [resolve(step, recipe.where) for step in recipe.steps]


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
