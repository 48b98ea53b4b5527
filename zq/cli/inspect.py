"""zq inspect: what a checkpoint holds, from its headers; with --audit, whether it still does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from zq.cli.console import command, facts, listing, note, out, print_json, size


def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or `demo`.")],
    layers: Annotated[bool, typer.Option("--layers", help="List every linear layer.")] = False,
    audit: Annotated[
        bool, typer.Option("--audit", help="Read every tensor and compare it with the hashes of the run.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Show the architecture, the schemes and the bytes of a checkpoint, original or quantized."""
    with command(json):
        from zq.source import resolve

        folder = resolve(checkpoint, note)
        found = describe(folder)
        if audit:
            from zq.audit import audit_folder

            found["audit"] = audit_folder(folder)
        if json:
            return print_json(found)
        table = facts()
        for key in ("folder", "model", "architecture", "quantization", "files", "parameters"):
            table.add_row(key, str(found[key]))
        table.add_row("size", size(found["bytes"]))
        for scheme, entry in found["schemes"].items():
            table.add_row(
                scheme,
                f"{entry['layers']} layers, {size(entry['bytes'])}, {entry['bits']:.3f} bits per weight",
            )
        if audit:
            table.add_row("audit", f"passed: {found['audit']['tensors']} tensors")
        out.print(table)
        if layers:
            listing(
                ("layer", "shape", "scheme", "bytes"),
                [
                    (name, "x".join(map(str, entry["shape"])), entry["scheme"], size(entry["bytes"]))
                    for name, entry in found["layers"].items()
                ],
            )


def describe(folder: Path) -> dict[str, Any]:
    """Facts from config.json and the headers; no weight is read."""
    import math

    import torch

    from zq.checkpoint.index import read_index
    from zq.export import schemes_of
    from zq.models.build import shapes_only, stores_pooler
    from zq.models.find import find_family, load_config
    from zq.models.layout import linear_shapes
    from zq.runtime.load import quantization_config

    arch = find_family(folder)
    index = read_index(folder)
    stored = quantization_config(folder)
    pooler = stores_pooler(arch, index.tensors)
    model = shapes_only(load_config(folder), str(folder), pooler=pooler)
    shapes = linear_shapes(model)
    exporter, assigned = schemes_of(stored, index, shapes) if stored else (None, {})
    layers: dict[str, Any] = {}
    schemes: dict[str, dict[str, float]] = {}
    for name, shape in shapes.items():
        scheme = assigned.get(name)
        if scheme and exporter:
            names = [slot.name for slot in exporter.slots(name, scheme, shape, torch.float32)]
        else:
            names = [f"{name}.weight"]
        nbytes = sum(index.tensors[n].nbytes for n in names if n in index.tensors)
        layers[name] = {
            "shape": list(shape),
            "scheme": str(scheme) if scheme else "as stored",
            "bytes": nbytes,
        }
        if scheme:
            entry = schemes.setdefault(str(scheme), {"layers": 0, "bytes": 0, "weights": 0})
            entry["layers"] += 1
            entry["bytes"] += nbytes
            entry["weights"] += math.prod(shape)
    for entry in schemes.values():
        entry["bits"] = 8 * entry["bytes"] / entry["weights"]
    return {
        "folder": str(folder),
        "model": type(model).__name__,
        "architecture": f"{arch.model_type}, {'encoder' if arch.encoder else 'decoder'}",
        "quantization": stored["quant_method"] if stored else "none",
        "files": len(index.files()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": index.nbytes,
        "schemes": schemes,
        "layers": layers,
    }
