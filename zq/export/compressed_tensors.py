"""compressed-tensors checkpoints, as vLLM, SGLang and transformers read them. Written without the library.

    format           when                                   tensors of layer NAME, weight [N, K]
    pack-quantized   int2..8, weight-only or with 8-bit     weight_packed I32 [N, ceil(K*b/32)],
                     activations (int8 with int8            weight_scale [N, G], weight_shape I64 [2],
                     activations excepted)                  asym: weight_zero_point I32 [ceil(N*b/32), G]
    int-quantized    int8 weights, int8 activations         weight I8 [N, K], weight_scale [N, G]
    float-quantized  e4m3 weights, e4m3 or no activations   weight F8_E4M3 [N, K], weight_scale [N, 1], in
                                                            tiles R x C [ceil(N/R), K/C] (`block`)

Codes are offset binary, zero points stay in the signed domain plus the same offset and are packed along
N. W4A8 must be pack-quantized: the library would infer int-quantized, one byte per weight, which no
CUDA server loads. Spec: compressed-tensors 0.17 to 0.20, and vLLM 0.33's loader.

Two-level scales are written as their products, which are ordinary group scales, exact in the model's dtype;
`levels` finds the two again (zq/numerics/levels.py). Which config groups are two-level stands in an entry of
zq's own, `"zq": {"two_level": ["group_0"]}`, that other readers pass over.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.writer import CODES, Slot
from zq.errors import ZqError
from zq.export.config_groups import MIXED, format_of, group, scheme_of
from zq.export.fields import ROOT, strings, wrong
from zq.export.native import from_unsigned, to_unsigned
from zq.numerics.levels import levels
from zq.numerics.packing import pack as pack_bits
from zq.numerics.packing import packed_words
from zq.numerics.packing import unpack as unpack_bits
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme, scale_shape

CONFIG_VERSION = "0.17.0"
Read = Callable[[str], Tensor]


def adapt(scheme: Scheme) -> Scheme:
    """As it is."""
    return scheme


def refuse(scheme: Scheme, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> str | None:
    """Why compressed-tensors cannot hold this layer, or None."""
    w, a = scheme.weights, scheme.activations
    problems = [
        (transposed, "the layer is transformers' Conv1D, and compressed-tensors knows only nn.Linear"),
        (w.layout.kind == "block", "compressed-tensors has no flat blocks"),
        (w.layout.kind == "rank1", "compressed-tensors has no rank-1 scales"),
        (w.layout.kind == "tile" and w.format != "e4m3fn", "zq writes tiles there for FP8 weights only"),
        (
            w.layout.kind == "tile" and a is not None and a.layout.kind != "group",
            f"FP8 weights in tiles need activations in groups, e4m3fn:g{w.layout.size}, or none",
        ),
        (w.rank > 0, "compressed-tensors has no low-rank corrections"),
        (w.kept > 0, "compressed-tensors has no columns that stay in 16 bits"),
        (w.center, "compressed-tensors subtracts no mean"),
        (w.inner > 0, "compressed-tensors has no power-of-two groups inside groups"),
        (
            w.scale_dtype is not None and (w.layout.kind, w.scale_dtype) != ("tile", "fp32"),
            "compressed-tensors stores scales in the model's dtype",
        ),
        (not w.info.is_int and w.format != "e4m3fn", f"compressed-tensors has no {w.format} weights"),
        (
            a is not None and a.format not in ("int8", "e4m3fn"),
            f"compressed-tensors has no {a and a.format} activations",
        ),
        (a is not None and a.narrow, "compressed-tensors has no narrow activations"),
        (
            w.format == "e4m3fn" and (w.layout.kind == "group" or (a and a.format == "int8")),
            "FP8 weights need a scale per channel, tensor or tile and no INT8 activations",
        ),
        (
            w.format == "int8" and a is not None and a.format != "int8",
            "compressed-tensors has no INT8 x FP8 scheme",
        ),
        (w.layout.kind == "tensor" and w.bits != 8, "packed weights need channel or group scales"),
        (
            w.format == "int8" and w.layout.kind == "tensor" and a is None,
            "packed weights need channel scales",
        ),
        (not w.symmetric and w.format == "int8" and a is not None, "W8A8 weights have no zero point"),
        (
            w.layout.kind == "group" and bool(shape[1] % (w.layout.size or 1)),
            f"groups of {w.layout.size} do not divide K={shape[1]}",
        ),
        (
            w.layout.kind == "tile" and bool(shape[1] % (w.layout.size or 1)),
            f"tiles of {w.layout.size} inputs do not divide K={shape[1]}",
        ),
    ]
    return next((reason for hit, reason in problems if hit), None)


def refuse_all(assigned: dict[str, Scheme], skipped: list[str]) -> str | None:
    """Every mix of schemes has a place."""
    return None


def slots(name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Slot]:
    spec, (n, k) = scheme.weights, shape
    scales = scale_shape(spec, shape)
    scale = Slot(f"{name}.weight_scale", "F32" if spec.scale_dtype else CODES[dtype], scales)
    kind = format_of(scheme)
    if kind != "pack-quantized":
        return [Slot(f"{name}.weight", "I8" if kind == "int-quantized" else "F8_E4M3", shape), scale]
    result = [
        Slot(f"{name}.weight_packed", "I32", (n, packed_words(k, spec.bits))),
        scale,
        Slot(f"{name}.weight_shape", "I64", (2,)),
    ]
    if not spec.symmetric:
        zero = (packed_words(n, spec.bits), scales[1])
        result.append(Slot(f"{name}.weight_zero_point", "I32", zero))
    return result


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    kind = format_of(scheme)
    products = q.scale if q.sub is None else (q.scale.float() * q.sub).to(q.scale.dtype)
    scale = {f"{name}.weight_scale": products}
    if kind == "int-quantized":
        return {f"{name}.weight": q.codes, **scale}
    if kind == "float-quantized":
        return {f"{name}.weight": q.codes.view(torch.float8_e4m3fn), **scale}
    bits = q.spec.bits
    tensors = {
        f"{name}.weight_packed": pack_bits(to_unsigned(q.codes, q.spec), bits),
        f"{name}.weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        **scale,
    }
    if q.zero is not None:
        zero = pack_bits(to_unsigned(q.zero, q.spec).T.contiguous(), bits).T.contiguous()
        tensors[f"{name}.weight_zero_point"] = zero
    return tensors


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Raises ZqError when the packed tensors disagree with the layer's shape, or the scales with its spec."""
    spec, kind = scheme.weights, format_of(scheme)
    scale, sub = read(f"{name}.weight_scale"), None
    if spec.two_level:
        found = levels(scale, spec)
        if found is None:
            raise ZqError(
                f"'{name}.weight_scale' is not integers times one scale per channel, as {spec} needs; "
                "quantize or download again"
            )
        scale, sub = found
    if kind == "int-quantized":
        return QTensor(read(f"{name}.weight"), scale, None, sub, spec)
    if kind == "float-quantized":
        return QTensor(read(f"{name}.weight").view(torch.uint8), scale, None, None, spec)
    stored = tuple(read(f"{name}.weight_shape").tolist())
    if stored != tuple(shape):
        raise ZqError(f"'{name}.weight_shape' says {stored} but the model has {tuple(shape)}")
    codes = from_unsigned(unpack_bits(read(f"{name}.weight_packed"), spec.bits, shape[1]), spec)
    zero = None
    if not spec.symmetric:
        packed = read(f"{name}.weight_zero_point").T.contiguous()
        zero = from_unsigned(unpack_bits(packed, spec.bits, shape[0]), spec).T.contiguous()
    return QTensor(codes, scale, zero, sub, spec)


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    """`assigned`: every quantized layer; `skipped`: every other linear layer of the model."""
    by_scheme: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in assigned.items():
        by_scheme[scheme].append(name)
    single = len(by_scheme) == 1
    groups = {
        f"group_{i}": group(scheme, ["Linear"] if single else _targets(names, assigned, scheme))
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    formats = {each["format"] for each in groups.values()}
    two_level = [name for name, scheme in zip(groups, by_scheme, strict=True) if scheme.weights.two_level]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(skipped),
        "version": CONFIG_VERSION,
        "config_groups": groups,
        **({"zq": {"two_level": two_level}} if two_level else {}),
    }


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Which scheme the config gives to each linear layer, by compressed-tensors' own rules: `ignore`
    first, then exact names and regexes, then the class name. Raises ZqError for what zq cannot read."""
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if config.get(key):
            raise ZqError(f"quantization_config has a '{key}', which zq does not read; quantize again")
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(each, dict) for each in groups.values()):
        raise wrong(ROOT, config, "config_groups", "a mapping of mappings")
    if not isinstance(config.get("format"), str | None):
        raise wrong(ROOT, config, "format", "the name of a format or null")
    paths = {name: f"{ROOT}.config_groups.{name}" for name in groups}
    parsed = {name: scheme_of(paths[name], each, config.get("format")) for name, each in groups.items()}
    for name in _two_level(config, groups):
        parsed[name] = _with_levels(name, parsed[name])
    claims = [(patterns(paths[name], each, "targets"), parsed[name]) for name, each in groups.items()]
    ignore = patterns(ROOT, config, "ignore")
    result: dict[str, Scheme] = {}
    for name in names:
        if any(_hits(target, name) for target in ignore):
            continue
        named = [s for targets, s in claims if any(_hits(t, name) for t in targets)]
        generic = [s for targets, s in claims if "Linear" in targets]
        found = named or generic
        if found:
            result[name] = found[0]
    return result


def _two_level(config: dict[str, Any], groups: dict[str, Any]) -> list[str]:
    """Names of the config groups whose scales are two-level."""
    own = config.get("zq")
    if own is None:
        return []
    if not isinstance(own, dict):
        raise wrong(ROOT, config, "zq", "a mapping")
    listed = own.get("two_level")
    if not isinstance(listed, list) or not all(isinstance(name, str) and name in groups for name in listed):
        raise wrong(f"{ROOT}.zq", own, "two_level", "a list of names of config_groups")
    return listed


def _with_levels(name: str, scheme: Scheme) -> Scheme:
    try:
        return replace(scheme, weights=replace(scheme.weights, two_level=True))
    except ZqError as error:
        raise ZqError(f"{ROOT}.zq.two_level names '{name}': {error}; quantize again") from None


def patterns(path: str, config: dict[str, Any], key: str) -> list[str]:
    """A list of names and "re:" patterns. Raises ZqError for anything else."""
    listed = strings(path, config, key)
    for entry in listed:
        try:
            re.compile(entry.removeprefix("re:"))
        except re.error as error:
            if entry.startswith("re:"):
                raise ZqError(f"{path}.{key} has '{entry}', no regex ({error}); download it again") from None
    return listed


def _hits(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], name) is not None
    return target == name


def _targets(names: list[str], assigned: dict[str, Scheme], scheme: Scheme) -> list[str]:
    """One regex per layer position where all blocks agree, else full names."""
    uses: dict[str, set[Scheme]] = defaultdict(set)
    for name, other in assigned.items():
        uses[_position(name)].add(other)
    targets = [_position(name) if uses[_position(name)] == {scheme} else name for name in names]
    return list(dict.fromkeys(targets))


def _position(name: str) -> str:
    """The same layer in every block, as a regex; engines differ in what stands before the block list."""
    found = re.match(r"(?:.*?\.)?([^.]+)\.\d+\.(.+)", name)
    return f"re:.*{re.escape(found[1])}\\.\\d+\\.{re.escape(found[2])}$" if found else name
