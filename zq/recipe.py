"""Recipes: YAML files that say which linear layers become what, and by which steps.

    about: INT4 weights in groups, INT8 activations per token.
    rules:                                  # the first rule that matches a layer wins
      - match: "*.down_proj"                # glob; "re:..." is a regex; "@attention", "@mlp" are kinds
        weights: int8:channel
        activations: int8:token
      - match: "*"                          # every linear layer inside the transformer blocks
        weights: int4:gauto
        activations: int8:token
    steps:
      - rtn: {scale: mse}
    calibration: {source: bundled, samples: 8, length: 256}
    bits: 4.5                               # optional: choose the width of every layer (zq/autobits.py)

Strict: an unknown key, a wrong type or a rule that matches nothing is an error naming the line. Layers
outside the blocks (lm_head, poolers) are touched only by a pattern that names them. `extends: NAME`
takes another recipe (one level) and puts this one's rules before its rules. `Recipe.parse(str(r)) == r`.

This module imports no torch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from zq.errors import ZqError
from zq.spec import Scheme, TensorSpec
from zq.strict_yaml import Map, known, read, typed

KEYS = ("name", "about", "extends", "preset", "rules", "bits", "steps", "calibration", "seed", "format")
OUTPUT_FORMATS = ("auto", "compressed-tensors", "zq", "gptq", "awq", "fp8")
KINDS = ("@attention", "@mlp")


@dataclass(frozen=True)
class Rule:
    """Layers that `match` get `scheme`, or stay as they are when it is None (skip).

    `where` is the place of the rule in its own file, "FILE:LINE", also when it was inherited; `why` says why
    a rule that nobody wrote is there.
    """

    match: str
    scheme: Scheme | None
    where: str = field(default="", compare=False)
    why: str = field(default="", compare=False)

    def matches(self, name: str, kind: str | None) -> bool:
        """`kind` is "attention" or "mlp" inside a block and None outside of the blocks."""
        if self.match in KINDS:
            return kind == self.match[1:]
        return self._hits(name) and (kind is not None or not self._hits_anything_like(name))

    def _hits_anything_like(self, name: str) -> bool:
        """Whether a name of the same form that nobody wrote would match just as well: then the pattern does
        not name this layer. The first form has no letters at all, for the patterns that ask for none."""
        strange = self._hits(re.sub(r"[^.]", "\0", name))
        return strange or all(self._hits(re.sub("[A-Za-z]", letter, name)) for letter in "jq")

    def _hits(self, name: str) -> bool:
        if self.match.startswith("re:"):
            return re.fullmatch(self.match[3:], name) is not None
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Step:
    """One algorithm and its options, checked by itself (`zq.quantizers`); `where` as in Rule."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    where: str = field(default="", compare=False)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Tokens that run through the blocks: `samples` windows of `length` tokens from `source`
    ("bundled", "random", "none", a file, or "hf:dataset"), and `generated` windows that the model itself
    writes (zq/models/sampling.py)."""

    source: str = "bundled"
    samples: int = 8
    length: int = 256
    generated: int = 0


@dataclass(frozen=True, kw_only=True)
class Bits:
    """A budget: `mean` bits per quantized weight, scales included, by choosing among `widths` for every site
    (none: those of zq/autobits.py); `where` as in Rule."""

    mean: float
    widths: tuple[int, ...] = ()
    where: str = field(default="--bits", compare=False)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """`where` is how messages call it: the path of a file, or "recipe NAME" of a shipped one."""

    name: str
    rules: tuple[Rule, ...]
    steps: tuple[Step, ...] = (Step("rtn", (("scale", "mse"),)),)
    calibration: Calibration = Calibration()
    about: str = ""
    seed: int = 0
    format: str = "auto"
    bits: Bits | None = None
    where: str = field(default="recipe", compare=False)

    @classmethod
    def parse(cls, text: str, where: str = "recipe", name: str = "recipe") -> Recipe:
        """YAML text -> Recipe. Raises ZqError `where:line: what is wrong`."""
        return _build(read(text, where), where, name)

    def __str__(self) -> str:
        rules: list[dict[str, Any]] = []
        for rule in self.rules:
            if rule.scheme is None:
                rules.append({"match": rule.match, "skip": True})
                continue
            entry = {"match": rule.match, "weights": str(rule.scheme.weights)}
            if rule.scheme.activations:
                entry["activations"] = str(rule.scheme.activations)
            rules.append(entry)
        data = {
            "name": self.name,
            "about": self.about,
            "rules": rules,
            **self._budget(),
            "steps": [{s.name: dict(s.options)} for s in self.steps],
            "calibration": vars(self.calibration),
            "seed": self.seed,
            "format": self.format,
        }
        # PyYAML reads Unicode's own line breaks back as spaces unless they are escaped.
        text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
        if re.search("[\x85\u2028\u2029]", text):
            return yaml.safe_dump(data, sort_keys=False, width=100)
        return text

    def _budget(self) -> dict[str, Any]:
        if self.bits is None:
            return {}
        widths = {"widths": list(self.bits.widths)} if self.bits.widths else {}
        return {"bits": {"mean": self.bits.mean, **widths}}

    @property
    def digest(self) -> str:
        """sha256 of everything that can change the result; not of name and description."""
        data = yaml.safe_load(str(self))
        del data["name"], data["about"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def rule_for(self, name: str, kind: str | None) -> Rule | None:
        return next((rule for rule in self.rules if rule.matches(name, kind)), None)

    def inherits(self, rule: Rule) -> bool:
        """Whether the rule comes from the recipe that this one extends."""
        return bool(rule.where) and rule.where.rpartition(":")[0] != self.where

    def with_group_size(self, size: int) -> Recipe:
        """Every group-wise weight spec with groups of `size`."""

        def resize(spec: TensorSpec) -> TensorSpec:
            same = spec.layout.kind == "group"
            return replace(spec, layout=replace(spec.layout, size=size)) if same else spec

        rules = tuple(
            replace(r, scheme=r.scheme and replace(r.scheme, weights=resize(r.scheme.weights)))
            for r in self.rules
        )
        return replace(self, rules=rules)


def recipe_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, or beside `zq/` in a source tree."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "recipes"


def shipped() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def source_text(name_or_file: str) -> tuple[str, str]:
    """(text, where) of a shipped recipe by name, or of a YAML file. Raises ZqError."""
    path = Path(name_or_file)
    if path.suffix not in (".yaml", ".yml") and "/" not in name_or_file:
        if name_or_file not in shipped():
            raise ZqError(
                f"recipe '{name_or_file}' is unknown; shipped: {', '.join(shipped())}; or give a .yaml file"
            )
        path = recipe_folder() / f"{name_or_file}.yaml"
        return path.read_text(encoding="utf-8"), f"recipe {name_or_file}"
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ZqError(f"cannot read recipe {path}: {reason}; give a readable .yaml file") from None


def presets() -> list[str]:
    """Names of the shipped presets: steps and calibration for whatever rules a recipe has."""
    return sorted(path.stem for path in (recipe_folder() / "presets").glob("*.yaml"))


def preset_text(name: str) -> str:
    """The YAML of a shipped preset. Raises ZqError for an unknown name."""
    if name not in presets():
        raise ZqError(f"preset '{name}' is unknown; allowed: {', '.join(presets())}")
    return (recipe_folder() / "presets" / f"{name}.yaml").read_text(encoding="utf-8")


def preset_about(name: str) -> str:
    """What a preset is for, in a sentence or two."""
    return typed(read(preset_text(name), f"preset {name}"), "about", str, f"preset {name}")


def with_preset(recipe: Recipe, name: str) -> Recipe:
    """The rules of `recipe` with the steps and the calibration of a preset. Raises ZqError."""
    where = f"preset {name}"
    data = read(preset_text(name), where)
    calibration = _calibration(data, where, Calibration())
    return replace(recipe, steps=_steps(data, where), calibration=calibration)


def load(name_or_file: str) -> Recipe:
    """A shipped recipe by name, or a YAML file."""
    text, where = source_text(name_or_file)
    return Recipe.parse(text, where, Path(name_or_file).stem)


MOST = 1 << 20  # calibration windows, and tokens in one


def _build(data: Map, where: str, name: str) -> Recipe:
    known(data, KEYS, where)
    base = None
    if "extends" in data:
        base = _extended(typed(data, "extends", str, where), where, data.lines["extends"])
    rules = tuple(_rule(r, where, data.lines["rules"]) for r in typed(data, "rules", list, where, []))
    values: dict[str, Any] = {"where": where}
    if "preset" in data:
        try:
            chosen = with_preset(base or Recipe(name=name, rules=()), typed(data, "preset", str, where))
        except ZqError as error:
            raise ZqError(f"{where}:{data.lines['preset']}: {error}") from None
        values |= {"steps": chosen.steps, "calibration": chosen.calibration}
    if "steps" in data:
        values["steps"] = _steps(data, where)
    if "calibration" in data:
        start = values.get("calibration") or (base.calibration if base else Calibration())
        values["calibration"] = _calibration(data, where, start)
    if "bits" in data:
        values["bits"] = _bits(data, where)
    values["name"] = typed(data, "name", str, where, name)
    for key, kind in (("about", str), ("seed", int), ("format", str)):
        if key in data:
            values[key] = typed(data, key, kind, where)
    if not 0 <= values.get("seed", 0) < 1 << 63:
        raise ZqError(
            f"{where}:{data.lines['seed']}: 'seed' must be from 0 to 2**63 - 1, not {values['seed']}"
        )
    if values.get("format", "auto") not in OUTPUT_FORMATS:
        raise ZqError(
            f"{where}:{data.lines['format']}: format '{values['format']}' is unknown; allowed: "
            f"{', '.join(OUTPUT_FORMATS)}"
        )
    rules += base.rules if base else ()
    if not rules:
        raise ZqError(f"{where}:1: no 'rules': say which layers become what, see `zq recipes show w4a8`")
    return replace(base, rules=rules, **values) if base else Recipe(rules=rules, **values)


def _steps(data: Map, where: str) -> tuple[Step, ...]:
    steps = tuple(_step(s, where, data.lines["steps"]) for s in typed(data, "steps", list, where))
    if not steps:
        raise ZqError(f"{where}:{data.lines['steps']}: 'steps' is empty; the simplest is: - rtn: {{}}")
    return steps


def _extended(name: str, where: str, line: int) -> Recipe:
    """The recipe that another one extends; a file is looked for beside the one that names it."""
    beside = Path(where).parent / name
    text, source = source_text(str(beside) if Path(where).is_file() and beside.is_file() else name)
    data = read(text, source)
    if "extends" in data:
        raise ZqError(
            f"{where}:{line}: '{name}' itself extends '{data['extends']}'; only one level is allowed"
        )
    return _build(data, source, Path(name).stem)


def _rule(entry: Any, where: str, line: int) -> Rule:
    if not isinstance(entry, Map):
        raise ZqError(f"{where}:{line}: a rule is a mapping such as {{match: '*', weights: int4:g128}}")
    known(entry, ("match", "weights", "activations", "skip"), where)
    spot = f"{where}:{entry.line}"
    match = typed(entry, "match", str, where)
    if match.startswith("@") and match not in KINDS:
        raise ZqError(f"{spot}: kind '{match}' is unknown; allowed: {', '.join(KINDS)}")
    if match.startswith("re:"):
        try:
            re.compile(match[3:])
        except re.error as error:
            raise ZqError(f"{spot}: '{match[3:]}' is not a regular expression: {error}") from None
    if typed(entry, "skip", bool, where, False):
        if "weights" in entry or "activations" in entry:
            raise ZqError(f"{spot}: a rule either skips or gives weights, not both")
        return Rule(match, None, spot)
    try:
        weights = TensorSpec.parse(typed(entry, "weights", str, where))
        acts = typed(entry, "activations", str, where, None)
        scheme = Scheme(weights, TensorSpec.parse(acts) if acts is not None else None)
    except ZqError as error:
        message = str(error)
        raise ZqError(message if message.startswith(where) else f"{spot}: {message}") from None
    if weights.rank:
        raise ZqError(
            f"{spot}: '{weights}': a rule gives no rank; drop 'lorc={weights.rank}' and add the step "
            f"- lorc: {{rank: {weights.rank}}}"
        )
    if weights.kept:
        raise ZqError(
            f"{spot}: '{weights}': a rule keeps no columns; drop 'keep={weights.kept}' and add the step "
            "- proxy: {share: 0.02}"
        )
    return Rule(match, scheme, spot)


def _step(entry: Any, where: str, line: int) -> Step:
    if isinstance(entry, str):
        return Step(entry, (), f"{where}:{line}")
    if not isinstance(entry, Map) or len(entry) != 1:
        raise ZqError(f"{where}:{line}: a step is one name with options, for example - rtn: {{scale: mse}}")
    ((name, options),) = entry.items()
    if isinstance(options, str):  # `- lkd: classic` is short for `- lkd-classic: {}`
        name, options = f"{name}-{options}", None
    if options is None:
        options = Map()
    if not isinstance(options, Map):
        raise ZqError(f"{where}:{entry.line}: the options of step '{name}' must be a mapping")
    return Step(name, tuple(sorted(_plain(options).items())), f"{where}:{entry.line}")


def _plain(value: Any) -> Any:
    """Nested mappings without their lines: what YAML can write again."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def _bits(data: Map, where: str) -> Bits:
    """`bits: 4.5`, or `bits: {mean: 4.5, widths: [3, 4, 8]}`."""
    spot = f"{where}:{data.lines['bits']}"
    entry = data["bits"] if isinstance(data["bits"], Map) else {"mean": data["bits"]}
    if isinstance(entry, Map):
        known(entry, ("mean", "widths"), where)
    mean, widths = entry.get("mean"), entry.get("widths", [])
    if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not 1 <= mean <= 32:
        raise ZqError(
            f"{spot}: 'bits' must be a mean from 1 to 32, such as 4.5 or {{mean: 4.5, widths: [4, 8]}}, "
            f"not {mean!r}"
        )
    whole = isinstance(widths, list) and all(type(width) is int and 2 <= width <= 8 for width in widths)
    if not whole or len(set(widths)) != len(widths) or ("widths" in entry and not widths):
        raise ZqError(
            f"{spot}: 'widths' must be a list of different whole numbers from 2 to 8, not {widths!r}"
        )
    return Bits(mean=float(mean), widths=tuple(widths), where=spot)


def _calibration(data: Map, where: str, start: Calibration) -> Calibration:
    entry = typed(data, "calibration", Map, where)
    known(entry, ("source", "samples", "length", "generated"), where)
    values = dict(vars(start))
    for key, least in (("source", None), ("samples", 1), ("length", 1), ("generated", 0)):
        if key in entry:
            values[key] = typed(entry, key, str if least is None else int, where)
            if least is not None and not least <= values[key] <= MOST:
                raise ZqError(
                    f"{where}:{entry.lines[key]}: '{key}' must be from {least} to {MOST}, not {values[key]}"
                )
    return Calibration(**values)
