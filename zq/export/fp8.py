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
from zq.export.fields import ROOT, shown, strings, wrong
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
LISTS = ("modules_to_not_convert", "ignored_layers")
PATTERN = re.compile(r"[*+?^$|\\(){}\[\]]")  # never run: it may take for ever
FUSED = (".qkv_proj", ".gate_up_proj")
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
    and for a list that engines read differently: vLLM has full names, those of fused layers too, and no head
    in FP8; transformers has parts and patterns, and takes a head for FP8 that a list does not name."""
    for key, values, allowed in FIELDS:
        if shown(config.get(key)) not in map(shown, values):  # 128.0 and true are other values
            raise wrong(ROOT, config, key, allowed)
    listed, names = _skipped(config), list(names)
    found = dict.fromkeys((name for name in uniform.in_blocks(names) if name not in (listed or ())), SCHEME)
    if listed is None:
        return found
    for entry in sorted(listed):
        covered = next((name for name in found if _covers(entry, name)), None)
        if covered:
            how = f"for transformers covers '{covered}' and for vLLM does not"
        elif PATTERN.search(entry):
            how = "transformers takes for a pattern and vLLM for a name"
        elif entry.endswith(FUSED):
            how = "vLLM takes for layers that it fuses and transformers for none"
        else:
            continue
        raise ZqError(
            f"{ROOT} leaves out '{entry}', which {how}; list the full names of layers in {LISTS[0]}"
        )
    heads = [name for name in names if name not in found and not any(_covers(x, name) for x in listed)]
    if heads:
        raise ZqError(
            f"{ROOT} does not leave out '{heads[0]}', which then is FP8 for transformers and not for vLLM; "
            f"add it to {LISTS[0]}"
        )
    return found


def _skipped(config: dict[str, Any]) -> set[str] | None:
    """The layers that stay as they are, None: the config names none. Of its two lists transformers takes the
    first that is not null, vLLM the second unless it is empty."""
    listed, second = (strings(ROOT, config, key) for key in LISTS)
    if second and config.get(LISTS[0]) is not None and set(second) != set(listed):
        raise wrong(ROOT, config, LISTS[1], f"null or the same names beside {LISTS[0]}")
    return None if all(config.get(key) is None for key in LISTS) else {*listed, *second}


def _covers(entry: str, name: str) -> bool:
    """transformers' rule for an entry that is no pattern: the end of a name, or its beginning up to a dot."""
    return name.endswith(entry) or f"{name}.".startswith(f"{entry.removesuffix('.')}.")
