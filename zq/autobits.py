"""Automatic bits: the width of every site's weights, so that the model loses least within a budget.

    bits: 4.5                               # mean bits per quantized weight, as written: codes and scales
    bits: {mean: 4.5, widths: [3, 4, 8]}    # default: 4 and 8, which engines run, and those of the rules

A site is the layers of a block that read one input: q, k and v, or gate and up. They get one width, because
engines run them as one. What each width of each site costs in accuracy is measured (zq/sensitivity.py), and
of all mixes within the budget the one with the least sum is taken. The result is an ordinary recipe with one
rule per layer that changes, so everything after this stage knows nothing of it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zq.checkpoint.job import Job
from zq.errors import ZqError, enough_memory
from zq.export import asked_as
from zq.plan import Plan, PlannedLayer, make_plan
from zq.recipe import Bits, Recipe, Rule
from zq.sensitivity import SiteWidths, measure
from zq.spec import Layout, Scheme

ENGINES = (4, 8)
WIDTHS = range(2, 9)
STEPS = 100_000  # of the budget above the least
ASKED, TABLE = "recipe before automatic bits", "automatic bits"


def settle(
    plan: Plan,
    *,
    resume: Path | None = None,
    progress: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Plan:
    """The plan with a width for every site; unchanged when its recipe asks for no bits.

    `resume`: a folder with a job, whose choice is taken again. `progress` as in `measure`. Raises ZqError
    when the budget is out of reach or the recipe has weights that are no integers.
    """
    asked = plan.recipe.bits
    if asked is None:
        return plan
    sites = _sites(plan, asked)
    _refuse_mix(plan, asked, sites)
    room = _room(plan, asked, sites)
    if resume is None:
        with enough_memory("give a shorter --length, another --device, or no bits"):
            errors = measure(plan, sites, progress)
        widths = choose([site.nbytes for site in sites], errors, room)
        table = {"mean": asked.mean, "asked": plan.recipe.digest, "sites": _rows(sites, errors, widths)}
    else:
        table = _recalled(plan, resume)
    recipe = _explicit(plan, asked, sites, table)
    chosen = make_plan(plan.folder, recipe, shard_bytes=plan.shard_bytes, device=str(plan.skeleton.device))
    count = Counter(row["bits"] for row in table["sites"])
    mix = ", ".join(f"{count[width]} of int{width}" for width in sorted(count))
    note = f"bits {asked.mean:g}: sites {mix}; {chosen.bits_per_weight:.3f} bits per weight as written"
    others = [line for line in chosen.notes if line not in plan.notes]
    return replace(chosen, notes=[*plan.notes, *others, note], sensitivity=table)


def offered(plan: Plan) -> list[dict[str, Scheme]]:
    """What may be chosen: for every width, the schemes of the layers that can have it, by name. Raises
    ZqError as `settle` does for weights that are no integers."""
    found: list[dict[str, Scheme]] = []
    for width in WIDTHS:
        at = {}
        for site in _sites(plan, plan.recipe.bits) if plan.recipe.bits else []:
            at |= site.named(width)
        found.append(at)
    return found


def fingerprint(plan: Plan) -> dict[str, str]:
    """What a job remembers of the choice, so that a resumed run need not measure again."""
    if plan.sensitivity is None:
        return {}
    return {ASKED: plan.sensitivity["asked"], TABLE: json.dumps(plan.sensitivity)}


def _recalled(plan: Plan, out: Path) -> dict[str, Any]:
    """The table of the job in `out`. Raises ZqError when there is none or it was begun differently."""
    job = Job.resume(out, {"model": plan.index.fingerprint(), ASKED: plan.recipe.digest})
    job.release()
    return json.loads(job.remembered[TABLE])


def _sites(plan: Plan, asked: Bits) -> list[SiteWidths]:
    """Every site with quantized layers, in the order of the model."""
    by_name = {layer.name: layer for layer in plan.layers if layer.scheme}
    own = {layer.scheme.weights.bits for layer in by_name.values() if layer.scheme}
    widths = sorted(set(asked.widths or (*ENGINES, *own)))
    sites = []
    for i in range(plan.skeleton.n_blocks):
        prefix = plan.skeleton.block_prefix(i)
        for site in plan.skeleton.arch.sites:
            names = [f"{prefix}.{path}" for path in site.linears]
            layers = tuple(by_name[name] for name in names if name in by_name)
            if layers:
                sites.append(_site(plan, asked, f"{prefix} {site.name}", i, layers, widths))
    return sites


def _site(
    plan: Plan, asked: Bits, name: str, block: int, layers: tuple[PlannedLayer, ...], widths: list[int]
) -> SiteWidths:
    schemes: dict[int, tuple[Scheme, ...]] = {}
    reasons: list[str] = []
    for layer in layers:
        assert layer.scheme is not None
        if not layer.scheme.weights.info.is_int:
            raise ZqError(
                f"{asked.where}: '{layer.name}' becomes {layer.scheme}, and bits are chosen among integers; "
                "skip the layer with a rule, or give no bits"
            )
    for width in widths:
        found = tuple(_at(layer.scheme, width) for layer in layers if layer.scheme)
        if reason := _refused(plan, layers, found):
            reasons.append(reason)
        else:
            schemes[width] = found
    if not schemes:
        raise ZqError(
            f"{asked.where}: {plan.format} holds none of the widths {widths} of '{name}': {reasons[0]}; "
            "give other widths"
        )
    nbytes = {
        width: sum(_nbytes(plan, layer, scheme) for layer, scheme in zip(layers, found, strict=True))
        for width, found in schemes.items()
    }
    return SiteWidths(name=name, block=block, layers=layers, schemes=schemes, nbytes=nbytes)


def _refused(plan: Plan, layers: tuple[PlannedLayer, ...], schemes: tuple[Scheme, ...]) -> str | None:
    """Why the format cannot hold one of these layers as the scheme at its place; None when it can."""
    both = zip(layers, schemes, strict=True)
    found = (plan.exporter.refuse(scheme, x.shape, x.transposed, plan.dtype) for x, scheme in both)
    return next((reason for reason in found if reason), None)


def _refuse_mix(plan: Plan, asked: Bits, sites: list[SiteWidths]) -> None:
    """Raises ZqError when the format has one width only, or one for all layers."""
    layers = sites[0].layers
    at = {w: tuple(_at(layer.scheme, w) for layer in layers if layer.scheme) for w in WIDTHS}
    held = [width for width in WIDTHS if not _refused(plan, layers, at[width])]
    mixed = plan.assigned
    for place, site in enumerate(sites):  # the narrowest and the widest in turn
        mixed |= site.named((min, max)[place % 2](site.schemes))
    reason = plan.exporter.refuse_all(mixed, [layer.name for layer in plan.layers if not layer.scheme])
    if len(held) == 1:
        reason = f"{plan.format} has int{held[0]} weights only"
    if reason:
        raise ZqError(
            f"{asked.where}: {reason}, so there are no widths to choose; drop the budget of bits, or use "
            f"{asked_as('compressed-tensors')}"
        )


def _at(scheme: Scheme, width: int) -> Scheme:
    """The scheme with weights of another width. Engines multiply INT8 by INT8 with one scale per channel."""
    weights = replace(scheme.weights, format=f"int{width}", rank=0, kept=0)
    in_int8 = scheme.activations is not None and scheme.activations.format == "int8"
    if width == 8 and in_int8 and weights.layout.kind == "group" and not weights.two_level:
        weights = replace(weights, layout=Layout("channel"))
    return replace(scheme, weights=weights)


def _nbytes(plan: Plan, layer: PlannedLayer, scheme: Scheme) -> int:
    """As written, with what the steps add to a layer (`rank`, `kept`)."""
    assert layer.scheme is not None
    own = layer.scheme.weights
    weights = replace(scheme.weights, rank=own.rank, kept=own.kept)
    stored = replace(layer, scheme=replace(scheme, weights=weights))
    return sum(slot.nbytes for slot in plan.layer_slots(stored))


def _room(plan: Plan, asked: Bits, sites: list[SiteWidths]) -> int:
    """Bytes for all sites together. Raises ZqError when no mix, or any mix, fits in."""
    quantized = [layer for layer in plan.layers if layer.scheme]
    weights = sum(math.prod(layer.shape) for layer in quantized)
    inside = {layer.name for site in sites for layer in site.layers}
    fixed = sum(slot.nbytes for x in quantized if x.name not in inside for slot in plan.layer_slots(x))
    least = fixed + sum(min(site.nbytes.values()) for site in sites)
    most = fixed + sum(max(site.nbytes.values()) for site in sites)
    budget = math.floor(asked.mean * weights / 8)
    if not least <= budget <= math.ceil(most):
        widths = sorted({width for site in sites for width in site.schemes})
        low, high = math.ceil(8000 * least / weights) / 1000, math.floor(8000 * most / weights) / 1000
        raise ZqError(
            f"{asked.where}: {asked.mean:g} bits per weight are out of reach; the widths "
            f"{', '.join(map(str, widths))} give from {low:.3f} to {high:.3f}, scales included; give a "
            "number in between, or other widths in a recipe: bits: {mean: M, widths: [3, 4, 8]}"
        )
    return budget - fixed


def choose(costs: list[dict[int, int]], errors: list[dict[int, float]], room: int) -> list[int]:
    """One key for each site such that the costs sum to at most `room` and the errors to the least.

    Dynamic programming over what is spent beyond the least, in units of the costs' common divisor, so the
    result is exact; where that makes more than STEPS units, in STEPS units, each cost rounded up.
    """
    extras = [{key: cost - min(row.values()) for key, cost in row.items()} for row in costs]
    room -= sum(min(row.values()) for row in costs)
    unit = max(math.gcd(*(extra for row in extras for extra in row.values())), math.ceil(room / STEPS), 1)
    size = room // unit
    best = torch.zeros(size + 1, dtype=torch.float64)
    picks = []
    for row, error in zip(extras, errors, strict=True):
        total = torch.full_like(best, math.inf)
        pick = torch.zeros(size + 1, dtype=torch.int8)
        for key, extra in sorted(row.items(), key=lambda item: item[1]):
            need = math.ceil(extra / unit)
            if need <= size:
                candidate = best[: size + 1 - need] + error[key]
                better = candidate < total[need:]
                total[need:][better], pick[need:][better] = candidate[better], key
        best = total
        picks.append(pick)
    chosen, left = [], size
    for row, pick in zip(reversed(extras), reversed(picks), strict=True):
        chosen.append(int(pick[left]))
        left -= math.ceil(row[chosen[-1]] / unit)
    return chosen[::-1]


def _rows(sites: list[SiteWidths], errors: list[dict[int, float]], widths: list[int]) -> list[dict[str, Any]]:
    return [
        {
            "site": site.name,
            "bits": width,
            "error": {str(w): e for w, e in error.items()},
            "bytes": {str(w): n for w, n in site.nbytes.items()},
        }
        for site, error, width in zip(sites, errors, widths, strict=True)
    ]


def _explicit(plan: Plan, asked: Bits, sites: list[SiteWidths], table: dict[str, Any]) -> Recipe:
    """The recipe with one rule for each layer whose width changes, and of its own rules those in use."""
    recipe, chosen = plan.recipe, {row["site"]: row for row in table["sites"]}
    rules: list[Rule] = []
    for site in sites:
        row = chosen[site.name]
        why = f"bits {asked.mean:g}: error {row['error'][str(row['bits'])]:.1e}"
        for layer, scheme in zip(site.layers, site.schemes[row["bits"]], strict=True):
            old = recipe.rule_for(layer.name, layer.kind)
            if old and old.scheme != scheme:
                rules.append(Rule(layer.name, scheme, why=why))
    changed = {rule.match for rule in rules}
    used = [recipe.rule_for(layer.name, layer.kind) for layer in plan.layers if layer.name not in changed]
    rules += [rule for rule in recipe.rules if any(rule is other for other in used)]
    return replace(recipe, rules=tuple(rules), bits=None)
