"""Which linear feeds the inputs of a site, channel by channel, and how widely its weights are spread.

In order: the linear at the other end of a link (zq/models/arch.py), with its layout of channels; the last
linear before the site in the order of computation that has as many outputs as the site has inputs; before the
first site of a block, such a linear of the block before; before the first block, the token embeddings.
"""

from __future__ import annotations

from torch import Tensor, nn

from zq.checkpoint.reader import Read
from zq.models.arch import Site, producer_channels
from zq.models.layout import is_transposed, linear_shape
from zq.models.skeleton import Skeleton


def spreads(skeleton: Skeleton, i: int, read: Read) -> dict[str, Tensor]:
    """For every site of block i, which is loaded: its name -> standard deviation [K] of the weights of the
    output unit that feeds each input channel, float32. Sites that nothing feeds in this way are missing."""
    block, sites = skeleton.block(i), skeleton.arch.sites
    found: dict[str, Tensor] = {}
    for place, site in enumerate(sites):
        inputs = linear_shape(block.get_submodule(site.linears[0]))[1]
        spread = _linked(skeleton, block, site, inputs)
        if spread is None:
            earlier = [path for before in sites[:place] for path in before.linears]
            spread = _last(block, earlier, inputs)
        if spread is None:
            spread = _outside(skeleton, i, inputs, read)
        if spread is not None:
            found[site.name] = spread
    return found


def _linked(skeleton: Skeleton, block: nn.Module, site: Site, inputs: int) -> Tensor | None:
    heads = skeleton.config.num_attention_heads
    for link in skeleton.arch.active_links(skeleton.config):
        if link.kind == "linear" and site.linears[0] in link.consumers:
            producer = block.get_submodule(link.producer)
            outputs = linear_shape(producer)[0]
            channels = producer_channels(link, n=outputs, k=inputs, heads=heads)
            return spread_of(producer.weight, is_transposed(producer))[channels]  # type: ignore[arg-type]
    return None


def _last(block: nn.Module, paths: list[str], inputs: int) -> Tensor | None:
    for path in reversed(paths):
        module = block.get_submodule(path)
        if linear_shape(module)[0] == inputs:
            return spread_of(module.weight, is_transposed(module))  # type: ignore[arg-type]
    return None


def _outside(skeleton: Skeleton, i: int, inputs: int, read: Read) -> Tensor | None:
    """Of the block before, or of the embeddings, from the checkpoint."""
    if i == 0:
        table = skeleton.model.get_input_embeddings()
        name = next(n for n, module in skeleton.model.named_modules() if module is table)
        found, transposed = f"{name}.weight", True
    else:
        paths = [path for site in skeleton.arch.sites for path in site.linears]
        block, prefix = skeleton.block(i - 1), skeleton.block_prefix(i - 1)
        fits = [path for path in paths if linear_shape(block.get_submodule(path))[0] == inputs]
        if not fits:
            return None
        found, transposed = f"{prefix}.{fits[-1]}.weight", is_transposed(block.get_submodule(fits[-1]))
    key = skeleton.param_keys[found]
    spread = spread_of(read([key])[key].to(skeleton.device), transposed)
    return spread if len(spread) == inputs else None


def spread_of(weight: Tensor, transposed: bool) -> Tensor:
    """weight [N, K], or [K, N] when transposed -> standard deviation [N] of each output unit's weights."""
    return weight.detach().float().std(0 if transposed else 1)
