"""The rows of the accuracy tables: a scheme, a method, and the recipe that both stand for. Pure data.

    methods    every scheme by every method
    ablation   layer-by-layer distillation (`lkd`) with one switch changed at a time
    scales     every shipped scheme rounded to nearest, by the choice of its scales

`LKD` is the only place that says what "lkd" means in these tables.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import yaml

from zq.methods import METHODS
from zq.recipe import Recipe, Step, load

Steps = list[dict[str, Any]]

AWQ: Steps = [{"awq": {"scale": "absmax"}}]
START: Steps = [{"gptq": {"scale": "mse-signed", "damp": 0.1}}]
LKD: Steps = [
    {"awq": {"scale": "absmax", "where": "activations"}},
    *START,
    {"lkd": {"iterations": 400, "lookahead": 1}},
]
TEXT = "calibration.txt"  # the name of the calibration text in recipes
SCHEMES: dict[str, tuple[str, str | None]] = {
    "w8a8": ("int8:channel", "int8:token"),
    "w4a16 g64": ("int4:g64", None),
    "w4a8 g64": ("int4:g64", "int8:token"),
    "w4a8 g64 two-level": ("int4:g64:two-level", "int8:token"),
    "w3 g64": ("int3:g64", None),
    "w2 g64": ("int2:g64", None),
}
# Of some schemes only what differs from another scheme's rows.
FEW = {"w4a8 g64 two-level": ("rtn", "gptq", "awq, gptq", "lkd")}
SHIPPED = ("w8a8", "w8a16", "fp8", "w4w8a8", "w4a16", "w4a8", "w4afp8")

# (step, option, values) of the ablation; the value that `LKD` has already is left out.
SWITCHES: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("lkd", "iterations", (100, 200, 400, 800)),
    ("lkd", "rounding_rate", (0.0, 1.0, 2.0)),
    ("lkd", "scale_rate", (0.0, 0.05, 0.2, 1.0)),
    ("lkd", "norm_rate", (0.0, 0.02)),
    ("lkd", "batch", (4, 8, 16)),
    ("lkd", "lookahead", (0, 1, 2)),
    ("lkd", "window", (1, 2)),
    ("lkd", "loss", ("normalised", "mse")),
    ("lkd", "inputs", ("quantized", "float")),
    ("lkd", "gradients", ("float", "int8", "int4")),
    ("lkd", "holdout", (0.0625, 0.25)),
    ("gptq", "importance", (0.0, 0.5, 1.0)),
    ("gptq", "damp", (0.01, 0.1, 0.3)),
    ("gptq", "scale", ("mse-signed", "mse", "absmax")),
    ("gptq", "asymmetry", (0.0, 0.25, 1.0)),
    ("gptq", "order", ("activation", "natural")),
    ("gptq", "windows", (0, 256)),
    ("awq", "scale", ("absmax", "mse")),
    ("awq", "duo", (False, True)),
)


@dataclass(frozen=True)
class Tokens:
    """What calibrates: `samples` windows of `length` tokens of text, `generated` that the model writes."""

    samples: int = 128
    length: int = 1024
    generated: int = 896


@dataclass(frozen=True)
class Row:
    """`yaml` is the recipe without its seed."""

    table: str
    scheme: str
    method: str
    yaml: str

    @property
    def name(self) -> str:
        return f"{self.table} {self.scheme} {self.method}"

    def recipe(self, seed: int, text: str) -> Recipe:
        """With its seed, and its calibration text at the path `text`."""
        recipe = replace(Recipe.parse(self.yaml, f"row '{self.name}'"), seed=seed)
        named = recipe.calibration.source == TEXT
        return replace(recipe, calibration=replace(recipe.calibration, source=text)) if named else recipe

    @property
    def calibrated(self) -> bool:
        return Recipe.parse(self.yaml).calibration.source == TEXT


def _yaml(scheme: str, steps: Steps, calibration: dict[str, Any]) -> str:
    weights, activations = SCHEMES[scheme]
    rule = {"match": "*", "weights": weights} | ({"activations": activations} if activations else {})
    data = {"rules": [rule], "steps": steps, "calibration": calibration}
    return yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)


def _text(tokens: Tokens, generated: int = 0) -> dict[str, Any]:
    return {
        "source": TEXT,
        "samples": tokens.samples,
        "length": tokens.length,
        "generated": generated,
    }


def method_rows(tokens: Tokens) -> Iterator[Row]:
    """rtn needs no tokens; only rows that end in `lkd` have generated windows."""
    text, written = _text(tokens), _text(tokens, tokens.generated)
    smooth: Steps = [{"smoothquant": {"alpha": 0.5}}]
    nearest: Steps = [{"rtn": {"scale": "mse"}}]
    for scheme in SCHEMES:
        table: list[tuple[str, Steps, dict[str, Any]]] = [
            ("rtn", nearest, {"source": "none"}),
            ("gptq", START, text),
            ("awq", [{"awq": {}}, *nearest], text),
        ]
        if SCHEMES[scheme][1]:  # outliers of the activations are what smoothing moves
            table += [
                ("smoothquant", smooth + nearest, text),
                ("smoothquant, gptq", smooth + START, text),
                ("awq, gptq", AWQ + START, text),
            ]
        table += [
            ("lkd as published", [{"lkd": "classic"}], text),
            ("lkd, text only", LKD, text),
            ("lkd", LKD, written),
        ]
        for method, steps, calibration in table:
            if method not in FEW.get(scheme, (method,)):
                continue
            yield Row("methods", scheme, method, _yaml(scheme, steps, calibration))


def ablation_rows(tokens: Tokens, scheme: str) -> Iterator[Row]:
    """The first row is `LKD` as it is; no other row does the same."""

    def row(method: str, steps: Steps, generated: int = tokens.generated, source: str = TEXT) -> Row:
        calibration = _text(tokens, generated) | {"source": source}
        return Row("ablation", scheme, method, _yaml(scheme, steps, calibration))

    yield row("lkd", LKD)
    for step, option, values in SWITCHES:
        if step == "awq" and not SCHEMES[scheme][1]:  # `LKD` scales only inputs that are quantized
            continue
        for value in values:
            if (steps := _switched(step, option, value)) != LKD:
                yield row(f"{option} {value}" if step == "lkd" else f"{step}, {option} {value}", steps)
    for share in (0.0, 1 / 7, 3 / 7, 2.0):
        count = round(share * tokens.generated)
        yield row(f"generated {count}", LKD, count)
    yield row("generated only", LKD, tokens.samples + tokens.generated, "none")
    without = {name: [step for step in LKD if name not in step] for name in ("awq", "lkd")}
    yield row("start rtn", [step if "gptq" not in step else {"rtn": {"scale": "mse-signed"}} for step in LKD])
    yield row("no lkd", without["lkd"])
    if SCHEMES[scheme][1]:
        yield row("no awq", without["awq"])
        yield row("smoothquant for awq", [{"smoothquant": {"alpha": 0.5}}, *without["awq"]])
    else:
        yield row("awq before", AWQ + without["awq"])
    yield row("rotate before", [{"rotate": {}}, *LKD])
    yield row("as published, batch 8", [{"lkd-classic": {"batch": 8}}])
    yield row("as published, then lkd", [{"lkd": "classic"}, LKD[-1]])


def _switched(name: str, option: str, value: Any) -> Steps:
    """`LKD` with one option changed; `LKD` itself where it has this value already."""
    changed = []
    for step in LKD:
        ((found, options),) = step.items()
        same = found != name or getattr(METHODS[name].options(**options), option) == value
        changed.append(step if same else {name: options | {option: value}})
    return changed


def scale_rows() -> Iterator[Row]:
    """Calibration off: nothing here needs tokens."""
    for name in SHIPPED:
        base = load(name)
        base = replace(base, name="", about="", calibration=replace(base.calibration, source="none"))
        for scale in ("absmax", "mse"):
            recipe = replace(base, steps=(Step("rtn", (("scale", scale),)),))
            yield Row("scales", name, f"rtn {scale}", str(recipe))
        if name in ("w4a16", "w4a8"):
            recipe = replace(base, steps=(Step("rtn", (("scale", "absmax"),)),))
            narrow = str(recipe).replace("int4:gauto", "int4:gauto:narrow")
            yield Row("scales", name, "rtn absmax, narrow", narrow)
