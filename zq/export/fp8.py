"""FP8 in tiles of 128 x 128 as DeepSeek-V3 and Qwen3 publish it: `quant_method: fp8`, which transformers
(FineGrainedFP8Config), vLLM and SGLang read.

For a linear layer NAME with an [N, K] weight:

    NAME.weight            F8_E4M3 [N, K]
    NAME.weight_scale_inv  F32 [ceil(N/128), ceil(K/128)], a factor despite its name; some tools write BF16

    w = weight * weight_scale_inv

Activations are rounded to FP8 in groups of 128, with scales made for each token. Scales are float32 whatever
the model is in, so zq's scheme of every layer says `s=fp32`. Spec: DeepSeek-V3's weights (README_WEIGHTS.md)
and transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.writer import Slot
from zq.errors import ZqError
from zq.export import uniform
from zq.export.fields import ROOT, strings, wrong
from zq.numerics.qtensor import QTensor
from zq.spec import Scheme, scale_shape

SIZE = 128
SCHEME = Scheme.parse(f"e4m3fn:{SIZE}x{SIZE}:s=fp32 @ e4m3fn:g{SIZE}")
FIELDS = (  # of the config: (name, what zq reads there, the same in words)
    ("activation_scheme", ("dynamic",), '"dynamic" (scales made for each token)'),
    ("weight_block_size", ([SIZE, SIZE],), f"[{SIZE}, {SIZE}]"),
    ("fmt", ("e4m3", None), '"e4m3" or null'),
    ("scale_fmt", ("float", None), '"float" or null'),  # ue8m0: powers of two, of activations too
    ("modules_to_convert", ([], None), "null (no embeddings)"),
)
Read = Callable[[str], Tensor]


def adapt(scheme: Scheme) -> Scheme:
    """Scales in float32."""
    return replace(scheme, weights=replace(scheme.weights, scale_dtype="fp32"))


def refuse(scheme: Scheme, shape: tuple[int, int], transposed: bool, dtype: torch.dtype) -> str | None:
    """Why the format cannot hold this layer, or None."""
    problems = [
        (transposed, "the layer is transformers' Conv1D, and the format knows only nn.Linear"),
        (scheme != SCHEME, f"the format has {SCHEME} only (--fp8-block)"),
        (
            any(side % SIZE for side in shape),  # it divides sides by the number of tiles
            f"tiles of {SIZE} do not divide both sides of {list(shape)}, and transformers would take others",
        ),
    ]
    return next((reason for hit, reason in problems if hit), None)


def refuse_all(assigned: dict[str, Scheme], skipped: list[str]) -> str | None:
    """Why one such checkpoint cannot hold these layers together, or None: servers keep heads as they are."""
    return uniform.only(assigned, "fp8")


def slots(name: str, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> list[Slot]:
    return [
        Slot(f"{name}.weight", "F8_E4M3", shape),
        Slot(f"{name}.weight_scale_inv", "F32", scale_shape(scheme.weights, shape)),
    ]


def pack(name: str, q: QTensor, scheme: Scheme) -> dict[str, Tensor]:
    return {f"{name}.weight": q.codes.view(torch.float8_e4m3fn), f"{name}.weight_scale_inv": q.scale}


def unpack(name: str, read: Read, scheme: Scheme, shape: tuple[int, int]) -> QTensor:
    """Raises ZqError for weights and scales that are no numbers."""
    codes, scale = read(f"{name}.weight").view(torch.uint8), read(f"{name}.weight_scale_inv").float()
    for kind, bad in (("weight", codes & 127 == 127), ("weight_scale_inv", ~scale.isfinite())):
        if bool(bad.any()):
            raise ZqError(f"'{name}.{kind}' holds {int(bad.sum())} NaN or Inf; quantize or download again")
    return QTensor(codes, scale, None, None, scheme.weights)


def config(assigned: dict[str, Scheme], skipped: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [SIZE, SIZE],
        "fmt": "e4m3",
        "modules_to_not_convert": sorted(skipped) or None,
    }


def schemes(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Every linear layer of the blocks but `modules_to_not_convert`. Raises ZqError for what zq cannot read,
    and for a list that engines read differently."""
    for key, values, allowed in FIELDS:
        if config.get(key) not in values:
            raise wrong(ROOT, config, key, allowed)
    listed = _skipped(config)
    inside = uniform.in_blocks(names)
    for entry, name in ((entry, name) for entry in listed for name in inside):
        if name not in listed and _covers(entry, name):
            raise ZqError(
                f"{ROOT} leaves out '{entry}', which for transformers covers '{name}' and for vLLM does not; "
                "list the full names of layers in modules_to_not_convert"
            )
    return dict.fromkeys((name for name in inside if name not in listed), SCHEME)


def _skipped(config: dict[str, Any]) -> set[str]:
    """The layers that stay as they are; vLLM calls them `ignored_layers` too."""
    named = {key: strings(ROOT, config, key) for key in ("modules_to_not_convert", "ignored_layers")}
    if named["modules_to_not_convert"] and named["ignored_layers"]:
        raise wrong(ROOT, config, "ignored_layers", "null beside modules_to_not_convert")
    return {name for listed in named.values() for name in listed}


def _covers(entry: str, name: str) -> bool:
    """transformers' rule: the end of a name; its beginning up to a dot, literally or as a regex."""
    try:
        return name.endswith(entry) or re.match(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))", name) is not None
    except re.error:
        return False
