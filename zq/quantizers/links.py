"""Which links of a model a recipe can use, and what may change along them.

A link is used when the recipe quantizes every consumer: folding into a weight that stays in bf16 would round
it for nothing. What changes are the producers, which are stored as they are (norms, biases, linears that the
recipe skips): the plan names them before the work begins, and the audit lets no other tensor change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from zq.models.arch import Link, producer_channels
from zq.models.layout import is_transposed, linear_shape
from zq.models.skeleton import Skeleton
from zq.quantizers.method import BlockLink, Layer, Method, Needs
from zq.spec import Scheme

Steps = Iterable[tuple[Method, Any]]


def folding(steps: Steps) -> str:
    """Names of the steps that fold scales along links, for messages; "" when none does."""
    names = [method.name for method, options in steps if Needs.LINKS in method.needs(options)]
    return " and ".join(dict.fromkeys(names))


def usable_links(skeleton: Skeleton, i: int, quantized: Container[str]) -> list[Link]:
    """The links of block i all of whose consumers are among `quantized` (full names)."""
    prefix = skeleton.block_prefix(i)
    return [
        link
        for link in skeleton.arch.active_links(skeleton.config)
        if all(f"{prefix}.{path}" in quantized for path in link.consumers)
    ]


def at_work(steps: list[tuple[Method, Any]], schemes: Collection[Scheme]) -> list[tuple[Method, Any]]:
    """The steps without those for rounded activations, where no scheme quantizes activations."""
    rounding = any(scheme.activations for scheme in schemes)
    return [(m, options) for m, options in steps if rounding or Needs.ROUNDED not in m.needs(options)]


def may_change(skeleton: Skeleton, quantized: Mapping[str, Scheme], steps: Steps) -> dict[str, str]:
    """Parameters that these steps may change beside quantized weights (full name -> scheme): full name ->
    names of the steps."""
    found: dict[str, list[str]] = {}
    for method, options in steps:
        for i in range(skeleton.n_blocks):
            for name in _changed(skeleton, i, quantized, method.needs(options)):
                if name in skeleton.param_keys and not (name.endswith(".weight") and name[:-7] in quantized):
                    found.setdefault(name, []).append(method.name)
    return {name: " and ".join(dict.fromkeys(names)) for name, names in found.items()}


def _changed(skeleton: Skeleton, i: int, quantized: Mapping[str, Scheme], needs: Needs) -> Iterator[str]:
    """Full names of the parameters of block i that a step of these needs may change."""
    prefix = skeleton.block_prefix(i)
    if Needs.PARAMETERS in needs:
        yield from skeleton.zone(i)
    elif Needs.NORMS in needs:
        yield from (f"{prefix}.{path}.weight" for path in skeleton.norms(i))
    elif Needs.LINKS in needs:
        names = {n for n, scheme in quantized.items() if scheme.activations or Needs.ROUNDED not in needs}
        for link in usable_links(skeleton, i, names):
            yield from (f"{prefix}.{link.producer}.{leaf}" for leaf in ("weight", "bias"))


def without_scale(skeleton: Skeleton, quantized: Container[str], steps: Steps) -> Iterator[str]:
    """A note about the quantized layers of the blocks to which no link leads, when a step folds scales."""
    names = folding(steps)
    layers = [info.name for i in range(skeleton.n_blocks) for info in skeleton.linears(i)]
    layers = [name for name in layers if name in quantized]
    reached = {
        f"{skeleton.block_prefix(i)}.{path}"
        for i in range(skeleton.n_blocks)
        for link in usable_links(skeleton, i, quantized)
        for path in link.consumers
    }
    missed = [name for name in layers if name not in reached]
    if not names or not missed:
        return
    if not reached:
        yield f"{names}: no exact link leads to any quantized layer of this model, so nothing is scaled"
    else:
        yield (
            f"{names}: {len(missed)} of {len(layers)} quantized layers stay as they are, no exact link leads "
            f"to them, first {missed[0]}"
        )


def block_links(
    skeleton: Skeleton, i: int, layers: list[Layer], stored: Callable[[str], torch.dtype]
) -> list[BlockLink]:
    """The usable links of block i, which is loaded. `stored` gives the dtype in which the output holds the
    parameter of a full name."""
    by_name = {layer.name: layer for layer in layers}
    block, prefix = skeleton.block(i), skeleton.block_prefix(i)
    found = []
    for link in usable_links(skeleton, i, by_name):
        name, producer = f"{prefix}.{link.producer}", block.get_submodule(link.producer)
        consumers = tuple(by_name[f"{prefix}.{path}"] for path in link.consumers)
        channels = producer_channels(
            link,
            n=_width(producer, link),
            k=consumers[0].weight.shape[1],
            heads=skeleton.config.num_attention_heads,
        )
        found.append(
            BlockLink(
                name=name,
                producer=producer,
                layer=by_name.get(name),
                is_norm=link.kind == "norm",
                transposed=is_transposed(producer),
                consumers=consumers,
                channels=torch.tensor(channels, device=consumers[0].weight.device),
                stored={leaf: stored(f"{name}.{leaf}") for leaf, _ in producer.named_parameters()},
            )
        )
    return found


def _width(producer: nn.Module, link: Link) -> int:
    """Output channels of a norm or a linear."""
    return producer.weight.shape[0] if link.kind == "norm" else linear_shape(producer)[0]  # type: ignore
