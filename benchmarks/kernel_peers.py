"""Rows for other kernels, where their packages are installed: humming-kernels, gemlite.

Each as its documentation says, with its own choice of tile. Activations are quantized before, by the package
itself, as in zq's rows. Weights are random: nothing here looks at results.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from kernel_rows import BF16, Row, normal

HUMMING = {  # name: (weights, activations)
    "humming W4A8-INT8 g128": ({"dtype": "int4", "group_size": 128}, {"dtype": "int8"}),
    "humming W8A8-INT8": ({"dtype": "int8"}, {"dtype": "int8"}),
    "humming W4A8-FP8 g128": ({"dtype": "int4", "group_size": 128}, {"dtype": "float8e4m3"}),
    "humming W4A16 g128": ({"dtype": "int4", "group_size": 128}, None),
}
Layer = Callable[[torch.Tensor], Callable[[Any], Any]]  # x -> (layer -> y)


def installed() -> dict[str, Callable[[int, int], Iterator[tuple[str, Any, Layer]]]]:
    """Of the packages that are there: (N, K) -> (name of the kernel, layer, how it is called)."""
    return {name: layers for name, layers in PACKAGES.items() if find_spec(name)}


def peer_rows(package: str, ms: list[int], n: int, k: int) -> Iterator[Row]:
    for name, layer, caller in installed()[package](n, k):
        held = sum(t.numel() * t.element_size() for t in _tensors(layer))
        for m in ms:
            moved = held + m * k * (2 if "A16" in name else 1) + 2 * m * n
            make = partial(_copies, layer, caller(normal(m, k, device="cuda")))
            yield Row("products", name, m, n, k, moved, 2 * m * n * k, held, make)


def _tensors(layer: Any) -> list[torch.Tensor]:
    return [*layer.parameters(), *layer.buffers()]


def _copies(layer: Any, call: Callable[[Any], Any], copies: int) -> list[Callable[[], Any]]:
    return [partial(call, copy.deepcopy(layer)) for _ in range(copies)]


def _humming(n: int, k: int) -> Iterator[tuple[str, Any, Layer]]:
    from humming.forward import may_quant_input  # type: ignore[import-not-found]
    from humming.layer import HummingLayer  # type: ignore[import-not-found]

    for name, (weights, activations) in HUMMING.items():
        layer = HummingLayer(n, k, dict(weights), activations and dict(activations), torch_dtype=BF16).cuda()
        layer.load_from_unquantized(normal(n, k, device="cuda"))
        layer.transform()

        def caller(x: torch.Tensor, layer: Any = layer, quantized: bool = activations is not None) -> Any:
            given, scale = may_quant_input(layer.humming_config, inputs=x) if quantized else (x, None)
            return lambda one: one(given, input_scale=scale)

        yield name, layer, caller


def _gemlite(n: int, k: int) -> Iterator[tuple[str, Any, Layer]]:
    from gemlite.helper import A16W4_HQQ_INT  # type: ignore[import-not-found]

    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device="cuda")
    scales = torch.full((n * k // 128, 1), 1e-3, dtype=BF16, device="cuda")
    layer = A16W4_HQQ_INT(device="cuda", dtype=BF16).from_weights(codes, scales, torch.full_like(scales, 8.0))
    yield "gemlite W4A16 g128", layer, lambda x: lambda one: one(x)


PACKAGES = {"humming": _humming, "gemlite": _gemlite}
