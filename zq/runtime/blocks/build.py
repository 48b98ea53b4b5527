"""From a block of transformers to a fused one, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zq.models.arch import Arch, gives_tuple
from zq.models.layout import is_linear
from zq.models.structure import Structure
from zq.runtime.blocks.attention import Attention
from zq.runtime.blocks.block import fused_class
from zq.runtime.blocks.site import Activation, Norm, Site
from zq.runtime.merge import reorderable, reordered
from zq.runtime.serving import ServedLinear

POSTS = ("post", "normed")  # orders whose norms feed the residual stream as well


def obstacle(block: nn.Module, arch: Arch, structure: Structure) -> str:
    """Why a block cannot be fused; "" when it can. Its quantized linears are ServedLinear already."""
    linears = [_at(block, path) for site in arch.sites for path in site.linears]
    if not any(isinstance(linear, ServedLinear) for linear in linears):
        return "no layer is quantized by zq"
    other = next((x for x in linears if not isinstance(x, ServedLinear) and not is_linear(x)), None)
    if other is not None:
        return f"a layer is a {type(other).__name__}"
    if structure.per_head and not all(reorderable(linear) for linear in linears):
        return "q, k and v come head by head, and weights in tiles cannot be put in another order"
    for path in (*structure.norms, *_head_norms(structure)):
        norm = _at(block, path) if path else None
        if isinstance(norm, nn.LayerNorm) or norm is None or hasattr(norm, "variance_epsilon"):
            continue
        return f"{path} is a {type(norm).__name__}"
    return ""


def fuse(block: Any, arch: Arch, structure: Structure, config: Any) -> None:
    """Make a block without an `obstacle` a fused one; its parts move over."""
    linears = {site.name: [_at(block, path) for path in site.linears] for site in arch.sites}
    module: Any = _at(block, structure.attention)
    width = int(getattr(module, structure.head_dim))
    queries = _inputs(linears["out"][0]) // width
    keys = (sum(_outputs(x) for x in linears["qkv"]) // width - queries) // 2
    if structure.per_head:
        order = torch.arange(3 * queries * width).reshape(queries, 3, width).transpose(0, 1).reshape(-1)
        linears["qkv"] = [reordered(linears["qkv"][0], order)]
    sites = {name: Site(parts) for name, parts in linears.items()}
    norm_1, norm_2 = (_at(block, path) if path else None for path in structure.norms)
    attend = Attention(module, config, structure.rope, width, queries, keys)
    if structure.head_norms is not None:
        attend.norm_heads(*(_at(block, path) for path in _head_norms(structure)))
    readers = _readers(structure.order, sites, norm_2 is None)
    parts = {
        "norm_1": Norm(norm_1, readers[0], structure.order in POSTS),
        "norm_2": None if norm_2 is None else Norm(norm_2, readers[1], structure.order in POSTS),
        "attend": attend,
        "activation": Activation(
            _at(block, structure.activation),
            structure.gated,
            sites["down"].takes,
            _inputs(linears["down"][0]),
        ),
        **sites,
    }
    module._modules.clear()
    block._modules.clear()
    for name, part in parts.items():
        setattr(block, name, part)
    block.order, block.tuple_output = structure.order, gives_tuple(arch, block)
    block.__class__ = fused_class(type(block))


def _readers(order: str, sites: dict[str, Site], one_norm: bool) -> Sequence[torch.dtype | None]:
    """What the readers of the first and the second norm take, where they agree."""
    first, second = sites["qkv"].takes, sites["up"].takes
    if order == "post":
        return second, None  # that of the second is in the next block
    if one_norm:
        return (first if first == second else None), None
    return first, second


def _head_norms(structure: Structure) -> list[str]:
    return [f"{structure.attention}.{name}" for name in structure.head_norms or ()]


def _at(block: Any, path: str) -> Any:
    for name in path.split("."):
        block = getattr(block, name)
    return block


def _inputs(linear: Any) -> int:
    return linear.in_features if hasattr(linear, "in_features") else linear.weight.shape[0]


def _outputs(linear: Any) -> int:
    return linear.out_features if hasattr(linear, "out_features") else linear.weight.shape[1]
