"""zq doctor: what an engine will do with a checkpoint, zq's or another tool's, before it is tried."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zq.cli.console import command, note, out, print_json
from zq.errors import ZqError

if TYPE_CHECKING:
    from collections.abc import Callable

    from zq.checkpoint.index import CheckpointIndex
    from zq.checkpoint.writer import Slot
    from zq.engines import Heads, Layer, Restate, Target, Verdict
    from zq.models.arch import Arch
    from zq.plan import Plan
    from zq.spec import Scheme

ENGINES = ("vllm", "sglang", "transformers", "sentence-transformers", "llama.cpp")


def doctor(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a hub id.")],
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            help="ENGINE[:VERSION][:smNN or cpu][:tp=N], for example vllm:0.33:sm90:tp=2; vllm:zq means vLLM "
            "with zq installed beside it. May be given several times. Default: every engine that zq knows.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Say which kernel will run, what an engine would ignore, and why it would not load.

    Reads config.json and headers, the scales of tiles, and one layer where another format may help. Exit
    code 2 when an engine that was asked for cannot load it.
    """
    with command(json):
        from zq.engines import judge, parse
        from zq.llamacpp import is_beside
        from zq.models.find import load_config
        from zq.source import resolve

        asked = [parse(text) for text in engine or ()]
        folder = resolve(checkpoint, note)
        targets = asked or [parse(text) for text in _engines(folder)]
        format, layers, wrong = read_layers(folder)
        file = is_beside(folder)
        heads, restate = head_counts(load_config(folder)), None if wrong else restated(folder, layers)
        verdicts = [
            judge(target, _read(target, format, file), layers, heads, restate, "zq export")
            for target in targets
        ]
        if json:
            print_json({str(v.target): _as_json(v, wrong) for v in verdicts})
        else:
            if wrong:
                out.print(f"no engine loads it: {wrong}", soft_wrap=True, style="red")
            for verdict in verdicts:
                show(verdict)
        if engine and (wrong or any(v.problems for v in verdicts)):
            raise typer.Exit(2)


def read_layers(folder: Path) -> tuple[str, list[Layer], str]:
    """(format, linear layers, what is wrong with the files or ""). Raises ZqError for what zq cannot read."""
    import torch

    from zq.checkpoint.index import read_index
    from zq.engines import Layer
    from zq.export import schemes_of
    from zq.models.build import shapes_only, stores_pooler
    from zq.models.find import find_family, load_config
    from zq.models.layout import base_prefix, linear_shapes
    from zq.runtime.load import quantization_config, tensor_problems

    stored = quantization_config(folder)
    if stored is None:
        raise ZqError(
            f"{folder} is not quantized, and zq doctor and zq serve take quantized checkpoints; make one "
            "with zq quantize (its --for judges it before any work)"
        )
    arch, index = find_family(folder), read_index(folder)
    model = shapes_only(load_config(folder), str(folder), pooler=stores_pooler(arch, index.tensors))
    shapes = linear_shapes(model)
    exporter, assigned = schemes_of(stored, index, shapes)
    slots = {
        slot.name: slot
        for name, scheme in assigned.items()
        for slot in exporter.slots(name, scheme, shapes[name], torch.float32)
    }
    wrong = list(tensor_problems(index, model, assigned, slots).values())
    if not assigned:
        wrong.append("config.json quantizes no layer")
    prefix = f"{base_prefix(model)}{arch.blocks}."
    layers = [
        Layer(name=name, shape=shape, scheme=assigned.get(name), site=_site(name, prefix, arch))
        for name, shape in shapes.items()
    ]
    if not wrong:
        _check_scales(index, [name for name in slots if _is_of_tiles(slots[name], assigned)])
    said = f"config.json and the tensors do not agree: {'; '.join(wrong)}; quantize or download again"
    return stored["quant_method"], layers, said if wrong else ""


def _is_of_tiles(slot: Slot, assigned: dict[str, Scheme]) -> bool:
    """Whether a tensor holds the scales of tiles, which are few enough to read."""
    layer, _, kind = slot.name.rpartition(".")
    return "scale" in kind and assigned[layer].weights.layout.kind == "tile"


def _check_scales(index: CheckpointIndex, names: list[str]) -> None:
    from zq.checkpoint.reader import reader

    scales = reader(index)(name for name in names if name in index.tensors)
    bad = [name for name, tensor in scales.items() if not bool(tensor.isfinite().all())]
    if bad:
        raise ZqError(
            f"{index.root}: {len(bad)} tensors of scales hold NaN or Inf, first '{bad[0]}'; quantize or "
            "download again"
        )


def restated(folder: Path, layers: list[Layer]) -> Restate:
    """How the checkpoint would be in another format: planned and, for its first layer, done."""

    @cache
    def restate(to: str) -> list[Layer]:
        from zq.convert import converted, plan_conversion
        from zq.llamacpp import blocks_of, plan_file

        plan = plan_file(folder) if to == "gguf" else plan_conversion(folder, to)
        (blocks_of if to == "gguf" else converted)(plan, next(iter(plan.before)))
        return [replace(layer, scheme=plan.after.get(layer.name)) for layer in layers]

    return restate


def head_counts(config: Any) -> Heads:
    """Attention heads that a transformers config states; 0 where it does not."""
    from zq.engines import Heads

    query = getattr(config, "num_attention_heads", 0)
    return Heads(query=query, kv=getattr(config, "num_key_value_heads", None) or query)


def _engines(folder: Path) -> list[str]:
    """Those that are asked by default."""
    sentences = (folder / "modules.json").is_file()
    return [name for name in ENGINES if sentences or name != "sentence-transformers"]


def _read(target: Target, format: str, file: bool) -> str:
    """The format that the engine would be given; `file`: beside the checkpoint is one for llama.cpp, as zq
    quantize --to gguf leaves it."""
    return "gguf" if file and target.engine == "llama.cpp" else format


def of_plan(plan: Plan) -> list[Layer]:
    """The linear layers of a plan."""
    from zq.engines import Layer

    found = []
    for layer in plan.layers:
        prefix = plan.skeleton.block_prefix(0).rpartition(".")[0] + "."
        site = _site(layer.name, prefix, plan.skeleton.arch)
        found.append(Layer(name=layer.name, shape=layer.shape, scheme=layer.scheme, site=site))
    return found


def check(plan: Plan, text: str, file: bool, again: Callable[[str], Plan] | None) -> list[str]:
    """What to tell about a plan for this engine; `file`: one for llama.cpp will be beside it; `again` makes
    the plan of another format. Raises ZqError when the engine could not load the result."""
    from zq.engines import LAST, judge, parse

    def restate(to: str) -> list[Layer]:
        assert again is not None
        try:
            return of_plan(again(to))
        except ZqError as error:  # what it says to do instead is no answer here: that would not load
            reason = str(error).rpartition("; ")[0] or str(error)
            raise ZqError(f"{reason}; {LAST}") from None

    target, heads = parse(text), head_counts(plan.skeleton.config)
    verdict = judge(target, _read(target, plan.format, file), of_plan(plan), heads, again and restate)
    if verdict.problems:
        raise ZqError(f"--for {text}: {verdict.refusal}")
    lines = [f"{verdict.target} runs {scheme} as {kernel}" for scheme, kernel in verdict.kernels.items()]
    return lines + [f"{verdict.target}: {line}" for line in verdict.warnings]


def show(verdict: Verdict) -> None:
    out.print(str(verdict.target), style="bold")
    for scheme, kernel in verdict.kernels.items():
        out.print(f"  {scheme}: {kernel}", soft_wrap=True)
    for line in verdict.warnings:
        out.print(f"  warning: {line}", soft_wrap=True, style="yellow")
    for line in verdict.problems:
        out.print(f"  does not load: {line}", soft_wrap=True, style="red")
    if verdict.advice:
        out.print(f"  {verdict.advice}", soft_wrap=True)


def _as_json(verdict: Verdict, wrong: str) -> dict[str, object]:
    problems = [*verdict.problems, *[wrong] * bool(wrong)]
    return {
        "loads": not problems,
        "kernels": verdict.kernels,
        "warnings": verdict.warnings,
        "problems": problems,
        "advice": verdict.advice,
    }


def _site(name: str, prefix: str, arch: Arch) -> tuple[int, str] | None:
    """(block, site) of a linear layer; None outside the blocks."""
    number, _, path = name.removeprefix(prefix).partition(".")
    if not name.startswith(prefix) or not number.isdigit():
        return None
    site = arch.site_of(path)
    return (int(number), site.name) if site else None
