"""Linear layers as a server holds them: fused along their outputs, and split between devices.

vLLM and SGLang make one layer of what reads one input (q, k and v; gate and up) and give each of `tp`
devices a part of it: of the outputs, or of the inputs where a layer ends a half of the block (out, down).
Heads of keys and values are whole on each device: with fewer heads than devices, several have the same one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from zq.spec import Scheme

SPLIT_INPUTS = ("out", "down")  # sites whose inputs are split; of the others the outputs
PACKED_ALONG_OUTPUTS = ("gptq", "awq")
AGAIN = {"tiles": "use FP8 with a scale per channel (--fp8)", "groups": "quantize again in groups that do"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer of the model. `site` is the name of its place in a block (zq/models/arch.py), with the
    block: the layers of one site are fused by servers. None outside the blocks."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    site: tuple[int, str] | None = None


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention heads of the model, and of its keys and values; 0 when unknown."""

    query: int = 0
    kv: int = 0


def sites(layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers by site; those outside the blocks are not among them."""
    found: dict[tuple[int, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.site is not None:
            found[layer.site].append(layer)
    return list(found.values())


def held(layers: Sequence[Layer], tp: int, heads: Heads) -> list[Layer]:
    """The quantized layers as one of `tp` devices has them; layers of a site with several schemes, which no
    server fuses, one by one."""
    found = [layer for layer in layers if layer.site is None and layer.scheme is not None]
    for members in sites(layers):
        parts = [replace(layer, shape=part(layer, members, tp, heads)) for layer in members]
        if len({layer.scheme for layer in members}) > 1:
            found += [layer for layer in parts if layer.scheme is not None]
        elif members[0].scheme is not None:
            shape = (sum(layer.shape[0] for layer in parts), parts[0].shape[1])
            found.append(replace(members[0], name=_joined(members), shape=shape))
    return found


def part(layer: Layer, members: Sequence[Layer], tp: int, heads: Heads) -> tuple[int, int]:
    """[N, K] of one device, rounded down where it cannot be split evenly (`refuse_split` says so)."""
    n, k = layer.shape
    assert layer.site is not None
    if layer.site[1] in SPLIT_INPUTS:
        return n, k // tp
    if _is_kv(layer, members, heads):
        return n // heads.kv * max(1, heads.kv // tp), k
    return n // tp, k


def refuse_fused(layers: Sequence[Layer]) -> list[str]:
    """Servers fuse the layers of a site into one, which has one scheme."""
    for members in sites(layers):
        found = {str(layer.scheme) if layer.scheme else "as it is" for layer in members}
        if len(found) > 1:
            names = ", ".join(layer.name for layer in members)
            return [
                f"{names} are fused into one layer and need one scheme, not {' and '.join(sorted(found))}"
            ]
    return []


def refuse_split(layers: Sequence[Layer], tp: int, heads: Heads, format: str) -> list[str]:
    """What cannot be split between devices, and packed words or tiles that a device or a fused layer would
    cut: the first of each kind, heads before all."""
    found: dict[str, str] = {}
    if heads.query % tp:
        found["heads"] = f"{heads.query} attention heads cannot be split between {tp} devices"
    elif heads.kv and heads.kv % tp and tp % heads.kv:
        found["heads"] = f"{heads.kv} heads of keys and values cannot be split between {tp} devices"
    for members in sites(layers):
        for layer in members:
            if layer.scheme is not None:
                found |= {
                    key: line
                    for key, line in _cuts(layer, members, tp, heads, format).items()
                    if key not in found
                }
    return list(found.values())


def _cuts(layer: Layer, members: Sequence[Layer], tp: int, heads: Heads, format: str) -> dict[str, str]:
    assert layer.scheme is not None
    assert layer.site is not None
    (n, k), w = layer.shape, layer.scheme.weights
    rows, inputs = part(layer, members, tp, heads)
    size = w.layout.size or 1 if w.layout.kind in ("group", "tile") else 1
    what = "tiles" if w.layout.kind == "tile" else "groups"
    inside = f"of {w.bits} bits end inside a packed 32-bit word"
    cannot = f"cannot be split between {tp} devices"
    if k % size and not (format == "zq" and what == "groups"):  # whose last group may be shorter
        return {"ragged": f"'{layer.name}': {what} of {size} do not divide its {k} inputs; {AGAIN[what]}"}
    if layer.site[1] in SPLIT_INPUTS and tp > 1:
        if k % tp or inputs % size:
            groups = f"{k} inputs in {what} of {size}" if size > 1 else f"{k} inputs"
            return {"inputs": f"'{layer.name}': {groups} {cannot}"}
        if _is_packed(layer.scheme, format) and inputs * w.bits % 32:
            return {"words": f"'{layer.name}': {inputs} inputs {inside}"}
        return {}
    if n % tp and not _is_kv(layer, members, heads):
        return {"outputs": f"'{layer.name}': {n} outputs {cannot}"}
    again = "" if tp > 1 else "; " + AGAIN[what]
    if rows % w.layout.rows and (tp > 1 or layer is not members[-1]):
        held = f"the {rows} outputs of a device" if tp > 1 else f"{rows} outputs, fused with others,"
        return {"tiles": f"'{layer.name}': {held} end inside a tile of {w.layout.rows}{again}"}
    zeros = format == "compressed-tensors" and w.info.is_int and not w.symmetric
    alone = tp == 1 and len(members) == 1
    if not alone and (zeros or format in PACKED_ALONG_OUTPUTS) and rows * w.bits % 32:
        again = "" if tp > 1 else "; use symmetric weights in compressed-tensors (--w4a16)"
        return {"zeros": f"'{layer.name}': the zero points of {rows} outputs {inside}{again}"}
    return {}


def _is_kv(layer: Layer, members: Sequence[Layer], heads: Heads) -> bool:
    """Keys and values with heads of their own, of which a device gets whole ones."""
    assert layer.site is not None
    return layer.site[1] == "qkv" and layer is not members[0] and heads.kv > 0


def _is_packed(scheme: Scheme, format: str) -> bool:
    """Whether several values along the inputs share a 32-bit word."""
    w = scheme.weights
    if format in ("zq", "gptq"):
        return True
    return format == "compressed-tensors" and w.info.is_int and (w.bits < 8 or scheme.activations is None)


def _joined(members: Sequence[Layer]) -> str:
    """One name for what is fused: model.layers.0.self_attn.q_proj+k_proj+v_proj."""
    last = "+".join(layer.name.rpartition(".")[2] for layer in members)
    parent = members[0].name.rpartition(".")[0]
    return f"{parent}.{last}" if parent else last
