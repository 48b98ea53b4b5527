"""The rules of a recipe against the linear layers of a model: what applies, and which groups fit."""

from __future__ import annotations

from zq.errors import ZqError
from zq.recipe import Recipe, Rule
from zq.spec import AUTO, Layout, choose_group_size


def check_rules(
    recipe: Recipe, found: list[tuple[str, str | None]], chosen: list[Rule | None], notes: list[str]
) -> None:
    """A rule that no layer gets is a mistake; one that was inherited may be meant for other models.

    `found` is (name, kind) of every linear layer, `chosen` the rule that each gets.
    """
    for rule in recipe.rules:
        if any(rule is other for other in chosen):
            continue
        taken = {id(c): c for (name, kind), c in zip(found, chosen, strict=True) if rule.matches(name, kind)}
        earlier = ", ".join(f"'{c.match}' ({c.where or 'above'})" for c in taken.values() if c)
        if earlier:
            problem = f"rule '{rule.match}' never applies, every layer that it matches is taken by {earlier}"
            remedy = "put it first or drop it"
        else:
            problem = f"rule '{rule.match}' matches no linear layer of this model"
            remedy = f"layers are named like {found[0][0]}; `zq inspect --layers` lists them"
        spot = rule.where or recipe.where
        if not recipe.inherits(rule):
            raise ZqError(f"{spot}: {problem}; {remedy}")
        notes.append(f"{spot}: {problem}")


def auto_group(rules: list[Rule | None], shapes: list[tuple[int, int]], notes: list[str]) -> int:
    """The size of automatic groups; AUTO when no rule in use has any."""
    auto = Layout("group", AUTO)
    ks = {
        shape[1]
        for rule, shape in zip(rules, shapes, strict=True)
        if rule and rule.scheme and rule.scheme.weights.layout == auto
    }
    if not ks:
        return AUTO
    size = choose_group_size(ks)
    if size is None:
        raise ZqError(
            f"no group size of 128, 64 or 32 divides every input size of the layers to quantize "
            f"({', '.join(map(str, sorted(ks)))}); give --group-size, or int4:channel in a recipe"
        )
    if size != 128:
        odd = next(k for k in sorted(ks) if k % 128)
        notes.append(f"group size {size}: 128 does not divide {odd}, an input size of this model")
    return size
