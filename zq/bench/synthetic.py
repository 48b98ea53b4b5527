"""Models of a config with random weights, made on their device: for speed, where no checkpoint is at hand.

Quantized layers are drawn, quantized and packed one after the other, so that no model is ever there in 16
bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zq import recipe as recipes
from zq.errors import ZqError
from zq.models.build import empty_model, get, put
from zq.models.families import FAMILIES
from zq.models.find import model_class
from zq.models.layout import base_prefix, linear_shape
from zq.numerics.qtensor import quantize
from zq.recipe import Recipe, Rule
from zq.rules import auto_group
from zq.runtime.served import serve
from zq.runtime.serving import ServedLinear
from zq.spec import Scheme

STD = 0.02  # of random weights, as language models begin


def empty(config: Any, dtype: torch.dtype, device: str) -> Any:
    """The model of a config without its weights (on meta)."""
    return empty_model(model_class(config), config, dtype=dtype, device=device)


def schemes(model: Any, text: str) -> dict[str, Scheme]:
    """The scheme of every linear layer in the blocks that `text` quantizes: a recipe by name or file, or a
    scheme such as "int4:g128 @ int8:token". Raises ZqError when it quantizes nothing."""
    recipe = _recipe(text)
    arch = FAMILIES[model.config.model_type]
    blocks = f"{base_prefix(model)}{arch.blocks}"
    layers = [
        (f"{blocks}.{i}.{path}", site.kind)
        for i in range(len(model.get_submodule(blocks)))
        for site in arch.sites
        for path in site.linears
    ]
    rules: list[Rule | None] = [recipe.rule_for(name, kind) for name, kind in layers]
    shapes = [linear_shape(model.get_submodule(name)) for name, _ in layers]
    size = auto_group(rules, shapes, [])
    found = {
        name: rule.scheme.with_group(size)
        for (name, _), rule in zip(layers, rules, strict=True)
        if rule and rule.scheme
    }
    if not found:
        raise ZqError(f"--scheme {text} quantizes no layer of this model; see `zq recipes`")
    return found


def _recipe(text: str) -> Recipe:
    if ":" in text and not Path(text).is_file():
        return Recipe(name=text, rules=(Rule("*", Scheme.parse(text)),))
    return recipes.load(text)


@torch.no_grad()
def random_model(
    config: Any, dtype: torch.dtype, device: str, assigned: Mapping[str, Scheme] | None = None
) -> Any:
    """A transformers model in eval mode on `device`: normal weights, norms of ones, biases of zeros. Layers
    of `assigned` are ready for serving (zq/runtime/served.py). The same weights each time."""
    model = empty(config, dtype, device)
    draw = torch.Generator(device).manual_seed(0)

    def normal(shape: tuple[int, ...] | torch.Size, kind: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=kind, device=device).mul_(STD)

    for name, scheme in (assigned or {}).items():
        linear = model.get_submodule(name)
        n, k = linear_shape(linear)
        q = quantize(normal((n, k), torch.float32), scheme.weights, scale_dtype=dtype)
        bias = None if linear.bias is None else torch.zeros(n, dtype=dtype, device=device)
        model.set_submodule(name, ServedLinear(serve(q, scheme.activations, dtype), bias, n, k))
    tied = model.all_tied_weights_keys
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if parameter.is_meta and name not in tied:
            # As transformers loads them: torch copies a head without gradients for every prompt.
            put(model, name, torch.nn.Parameter(_filled(name, parameter, normal, device)))
    for name, source in tied.items():
        put(model, name, get(model, source))
    return model


def _filled(name: str, parameter: Tensor, normal: Any, device: str) -> Tensor:
    if parameter.dim() > 1:
        return normal(parameter.shape, parameter.dtype)
    make = torch.zeros if name.endswith("bias") else torch.ones
    return make(parameter.shape, dtype=parameter.dtype, device=device)
