"""Which cells a sweep has: model x bits x data type x block x seed, and each model's original. No torch.

A data type is a family whose format depends on the width, or the name of one format (docs/formats.md):

    int         int2 .. int8
    float       OCP's rules, finite only: e2m0fn, e2m1fn, e2m2fn, e2m3fn, e3m3fn, e4m3fn
    float-paper the Float of the k-bit scaling laws' figures: 3 exponent bits, 2 at 3 bits (e3m0paper is
    4-bit) dynamic, linear, nf, quantile, kmeans      3 to 8 bits

A block is a number of values that share a scale, counted flat through the weight (64 is the layout b64, as in
arXiv:2212.09720), or any layout by its name (channel, g64, tensor, rank1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zq.errors import ZqError
from zq.formats import FORMATS
from zq.recipe import Calibration, Recipe, Rule, Step
from zq.spec import AUTO, Layout, Scheme, TensorSpec

BITS = range(2, 9)
FLOATS = {3: "e2m0fn", 4: "e2m1fn", 5: "e2m2fn", 6: "e2m3fn", 7: "e3m3fn", 8: "e4m3fn"}
PAPER = {k: f"e{2 if k == 3 else 3}m{k - (3 if k == 3 else 4)}paper" for k in range(3, 9)}
FAMILIES = ("int", "float", "float-paper", "dynamic", "linear", "nf", "quantile", "kmeans")
NEAREST = Recipe(
    name="sweep",
    rules=(Rule("*", Scheme.parse("int8:channel")),),
    steps=(Step("rtn", (("scale", "absmax"),)),),
    calibration=Calibration(source="none"),
    where="the sweep's recipe",
)


@dataclass(frozen=True, order=True)
class Cell:
    """One quantization of one model; `spec` is what its weights become, None: the original as it is.

    `bits` of an original are those of its dtype. `type` and `block` are as asked for.
    """

    model: str
    bits: int
    type: str = "original"
    block: str = ""
    seed: int = 0
    spec: str | None = None

    def __str__(self) -> str:
        if self.spec is None:
            return f"{self.model} original"
        return f"{self.model} {self.spec}" + (f" seed {self.seed}" if self.seed else "")


PLAIN = Cell("", 8, "int", "channel", 0, "int8:channel")


@dataclass(frozen=True)
class Skipped:
    """A combination that does not exist, and why."""

    what: str
    why: str


def whole_numbers(option: str, text: str, low: int, high: int) -> list[int]:
    """ "3,4,8" -> [3, 4, 8]. Raises ZqError naming the option for anything else, and for one given twice."""
    words = _words(option, text)
    for word in words:
        if not re.fullmatch("[0-9]{1,18}", word) or not low <= int(word) <= high:
            raise ZqError(
                f"{option} {text}: '{word}' is not allowed; give whole numbers from {low} to {high}, "
                "separated by commas"
            )
    return [int(word) for word in words]


def data_types(text: str) -> list[str]:
    """ "int,nf,e3m0paper" -> the families and formats. Raises ZqError for an unknown one."""
    words = _words("--types", text)
    for word in words:
        if word not in FAMILIES and word not in FORMATS:
            raise ZqError(
                f"--types {text}: '{word}' is unknown; allowed: {', '.join(FAMILIES)}, or the name of a "
                "format in docs/formats.md such as e3m0paper"
            )
    return words


def blocks(text: str) -> list[str]:
    """ "64,1024,channel" -> as given, each checked. Raises ZqError for what is no layout of weights."""
    words = _words("--blocks", text)
    for word in words:
        try:
            found = layout(word)
        except ZqError as error:
            raise ZqError(f"--blocks {text}: {error}") from None
        if found.kind == "token" or found.size == AUTO:
            raise ZqError(
                f"--blocks {text}: '{word}' is not allowed; give numbers of values such as 64, or channel, "
                "tensor, rank1, gN"
            )
    return words


def layout(block: str) -> Layout:
    """The layout that a block means. Raises ZqError."""
    return Layout.parse(f"b{block}" if block.isdigit() else block)


def format_of(type: str, bits: int) -> str | None:
    """The format of a type at a width; None where there is none."""
    if type in ("float", "float-paper"):
        return (FLOATS if type == "float" else PAPER).get(bits)
    name = f"{type}{bits}" if type in FAMILIES else type
    return name if name in FORMATS and FORMATS[name].bits == bits else None


def grid(
    models: Sequence[str],
    bits: Iterable[int],
    types: Iterable[str],
    blocks: Iterable[str],
    seeds: Iterable[int],
) -> tuple[list[Cell], list[Skipped]]:
    """Every cell but the originals, model by model, and what does not exist, each once."""
    cells: list[Cell] = []
    skipped: dict[str, Skipped] = {}
    bits, types, blocks, seeds = list(bits), list(types), list(blocks), list(seeds)
    for model in models:
        for width in bits:
            for type in types:
                name = format_of(type, width)
                if name is None:
                    what = f"{type} of {width} bits"
                    skipped[what] = Skipped(what, _widths(type))
                    continue
                for block in blocks:
                    spec = f"{name}:{layout(block)}"
                    why = _refused(spec)
                    if why:
                        skipped[spec] = Skipped(spec, why)
                    else:
                        cells += [Cell(model, width, type, block, seed, spec) for seed in seeds]
    named: dict[tuple[str, str, int], Cell] = {}
    for cell in cells:
        assert cell.spec is not None
        key = (cell.model, cell.spec, cell.seed)
        if key in named:
            what = f"{cell.type} {cell.bits} {cell.block}"
            skipped[what] = Skipped(what, f"it is {cell.spec}, as {named[key].type} {named[key].block} is")
        named.setdefault(key, cell)
    return list(named.values()), list(skipped.values())


def recipe_of(cell: Cell, base: Recipe = NEAREST) -> Recipe:
    """`base` with the cell's weights in every rule that quantizes, in zq's own format, so that all cells
    store codes and scales alike. Activations, skipped layers, steps and calibration are those of `base`."""
    assert cell.spec is not None
    weights = TensorSpec.parse(cell.spec)
    rules = tuple(replace(r, scheme=r.scheme and replace(r.scheme, weights=weights)) for r in base.rules)
    return replace(base, name=cell.spec, rules=rules, seed=cell.seed, format="zq")


def method_of(base: Recipe) -> str:
    """How all cells of a sweep are quantized: the steps, and unless it is the default a digest of everything
    that `recipe_of` leaves as it is."""
    steps = ", ".join(" ".join([step.name, *(f"{k}={v}" for k, v in step.options)]) for step in base.steps)
    if base == NEAREST:
        return steps
    return f"{steps} ({base.name} {recipe_of(PLAIN, base).digest[:8]})"


def _widths(type: str) -> str:
    found = [str(width) for width in BITS if format_of(type, width)]
    return f"{type} has {', '.join(found)} bits" if found else f"{type} is no format of weights"


def _refused(spec: str) -> str | None:
    try:
        Scheme(TensorSpec.parse(spec))
    except ZqError as error:
        return str(error)
    return None


def _words(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len(set(words)) != len(words):
        raise ZqError(f"{option} '{text}' must be different values separated by commas, without empty ones")
    return words
