"""The methods that a recipe can name as steps: one file each, one row here."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

from zq.distill import classic, lkd
from zq.errors import ZqError
from zq.quantizers import awq, gptq, lorc, proxy, rotate, rtn, smoothquant
from zq.quantizers.method import Method, Needs
from zq.recipe import KEYS, Recipe, Step

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
QUANTIZERS = (rtn.METHOD, gptq.METHOD, classic.METHOD)  # one of them, once


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
                + _elsewhere(key)
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


def _elsewhere(key: str) -> str:
    """Where an option belongs that a step has not, as the end of a message."""
    if key in KEYS:
        return f"; '{key}' stands beside 'steps', for all of them"
    having = [m.name for m in _ROWS if key in {f.name for f in fields(m.options)}]
    names = ", ".join(f"'{name}'" for name in having)
    return f"; '{key}' belongs to {names}: write - {having[0]}: {{{key}: ...}}" if having else ""


def resolve_all(recipe: Recipe) -> list[tuple[Method, Any]]:
    """The steps of a recipe, each as `resolve` has it, in order. Raises ZqError also for an order that makes
    no sense: first what changes the whole model, then what scales float weights and chooses columns, then one
    step that quantizes, what learns from that, and last a correction of what is left."""
    found = [resolve(step, recipe.where) for step in recipe.steps]
    for place, step in enumerate(recipe.steps):
        if reason := _misplaced(found, place):
            raise ZqError(f"{step.where or recipe.where}: step '{step.name}' {reason}")
    if not any(method in QUANTIZERS for method, _ in found):
        spot = recipe.steps[-1].where or recipe.where
        raise ZqError(f"{spot}: no step quantizes; add one, such as - rtn: {{}}")
    return found


def refuse_few(recipe: Recipe, samples: int) -> None:
    """Raises ZqError when a step needs more calibration windows than these."""
    for step, (method, options) in zip(recipe.steps, resolve_all(recipe), strict=True):
        least = method.fewest(options)
        if samples < least:
            raise ZqError(
                f"{step.where or recipe.where}: step '{step.name}' needs at least {least} calibration "
                f"windows, more than one batch, and has {samples}; give more --samples, or a smaller 'batch'"
            )


def _misplaced(steps: list[tuple[Method, Any]], place: int) -> str | None:
    """Why a step cannot stand behind those before it; None when it can."""
    (method, options), before = steps[place], steps[:place]
    last = place == len(steps) - 1
    quantizer = next((m.name for m, _ in before if m in QUANTIZERS), None)
    scaling = next((m.name for m, o in before if Needs.LINKS in m.needs(o)), None)
    if method.view and before:
        return "changes the whole model, so it must be the first step, and given once; move it up or drop it"
    if Needs.LINKS in method.needs(options) and quantizer:
        return f"scales float weights; put it before '{quantizer}'"
    if method is proxy.METHOD and (scaling or quantizer):
        return f"chooses columns of float weights; put it before '{scaling or quantizer}'"
    if method in QUANTIZERS and quantizer:
        return f"would quantize what '{quantizer}' has rounded; keep one of them"
    if method is lkd.METHOD and not quantizer:
        return "learns from what a step that quantizes left; put rtn or gptq before it"
    if method is lorc.METHOD and not (quantizer and last):
        return "corrects what the steps before it left; put it once, as the last step, after rtn or gptq"
    return None
