"""The methods that a recipe can name as steps: one file each, one row here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from zq.distill import classic, lkd
from zq.errors import ZqError
from zq.quantizers import awq, gptq, lorc, proxy, rotate, rtn, smoothquant
from zq.quantizers.method import Method, Needs
from zq.recipe import Recipe, Step

_ROWS = (
    rotate.METHOD,
    smoothquant.METHOD,
    awq.METHOD,
    proxy.METHOD,
    rtn.METHOD,
    gptq.METHOD,
    lkd.METHOD,
    classic.METHOD,
    lorc.METHOD,
)
METHODS: dict[str, Method] = {m.name: m for m in _ROWS}


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
        whole = type(value) is int and type(default) is float
        if default is not MISSING and type(value) is not type(default) and not whole:
            raise ZqError(f"{spot}: '{key}' must be {type(default).__name__}, not {value!r}")
        low, high = known[key].metadata.get("range", (None, None))
        if low is not None and not low <= value <= high:
            raise ZqError(f"{spot}: '{key}: {value}' is not allowed; allowed: {low} to {high}")
    try:
        return method, method.options(**dict(step.options))
    except ZqError as error:
        raise ZqError(f"{spot}: {error}") from None


def resolve_all(recipe: Recipe) -> list[tuple[Method, Any]]:
    """The steps of a recipe, each as `resolve` has it, in order. Raises ZqError also for an order that makes
    no sense: first what changes the whole model, then what scales float weights, then what quantizes them,
    and last a correction of what that left."""
    found = [resolve(step, recipe.where) for step in recipe.steps]
    quantizer = None
    for place, (step, (method, options)) in enumerate(zip(recipe.steps, found, strict=True)):
        spot = step.where or recipe.where
        if method.view and place:
            raise ZqError(
                f"{spot}: step '{step.name}' changes the whole model, so it must be the first step, and "
                "given once; move it up or drop it"
            )
        if Needs.LINKS in method.needs(options) and quantizer:
            raise ZqError(f"{spot}: step '{step.name}' scales float weights; put it before '{quantizer}'")
        if method is proxy.METHOD and quantizer:
            raise ZqError(
                f"{spot}: step 'proxy' chooses columns of float weights; put it before '{quantizer}'"
            )
        if method is lorc.METHOD and (not quantizer or step is not recipe.steps[-1]):
            raise ZqError(
                f"{spot}: step 'lorc' corrects what the steps before it left; put it once, as the last step, "
                "after rtn or gptq"
            )
        if not method.view and not method.needs(options) & (Needs.LINKS | Needs.SPREADS):
            quantizer = quantizer or method.name
    return found
