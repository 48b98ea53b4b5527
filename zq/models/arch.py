"""The vocabulary in which an architecture is described: plain frozen data, no torch, no transformers.

A model is a stack of equal *blocks*. Inside a block
- a `Site` is a set of linears that read the same input, so that one statistic (channel maximum,
  Hessian) serves them all. All linears of a site have one kind, "attention" or "mlp": where both
  kinds read one tensor (GPT-J) there are two sites.
- a `Link` is a producer and the linears that consume its output, such that dividing channel c of
  the producer by s_c and multiplying input channel c of every consumer by s_c leaves the block
  unchanged for every s > 0 *exactly* (up to rounding). SmoothQuant (arXiv:2211.10438) and AWQ
  (arXiv:2306.00978) fold their scales along links. A norm whose output also feeds the residual
  stream (BERT, OPT-350m) is no producer and is left out, and so is a GELU between two linears.

Every path in a `Site`, a `Link` or `norms` is relative to the block; `blocks`, `tail` and `pooler`
are relative to the base model (`model.base_model` of transformers).
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from typing import Any

KINDS = ("attention", "mlp")


@dataclass(frozen=True, kw_only=True)
class Site:
    """Linears of one kind that read the same input."""

    name: str
    kind: str
    linears: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Link:
    """A producer whose output channels can carry the input scale of its consumers.

    kind: "norm" (divide weight and, where there is one, bias) or "linear" (divide rows of the
        weight and entries of the bias; for a transposed linear, columns of the weight).
    channels: which output channel of the producer feeds input channel c of a consumer, see
        `producer_channels`.
    when: pairs (config attribute, value) that must all hold for the link to be exact.
    """

    producer: str
    consumers: tuple[str, ...]
    kind: str
    channels: str = "same"
    when: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Arch:
    """One architecture.

    blocks: path of the ModuleList of blocks.
    writers: linears whose outputs, and nothing else, are added to the residual stream, where every
        reader of the stream is an RMSNorm and is the producer of a link; () in every other family.
    norms: norms inside a block; a path that a config switches off may be missing from the module.
    tail: modules applied after the last block, in order; those that a config switches off
        (None in the module) are passed over.
    pooler: module that reads the last hidden state but is no part of it.
    positions_after_pad: positions are counted from pad_token_id + 1 (RoBERTa), which shortens the
        longest sequence.
    tuple_output: whether a block returns a tuple that starts with the hidden states, see `gives_tuple`.
    """

    model_type: str
    blocks: str
    sites: tuple[Site, ...]
    links: tuple[Link, ...]
    norms: tuple[str, ...]
    writers: tuple[str, ...] = ()
    tail: tuple[str, ...] = ()
    pooler: str = ""
    encoder: bool = False
    positions_after_pad: bool = False
    tuple_output: bool = False

    def site_of(self, linear: str) -> Site | None:
        """The site that holds the linear at this path relative to the block, or None."""
        return next((site for site in self.sites if linear in site.linears), None)

    def active_links(self, config: Any) -> tuple[Link, ...]:
        """The links that are exact under this transformers config."""
        return tuple(
            link
            for link in self.links
            if all(getattr(config, name, None) == value for name, value in link.when)
        )


def gives_tuple(arch: Arch, block: Any) -> bool:
    """Whether a block, a module, returns a tuple in this version of transformers: GPT-J's did before 5.24."""
    declared = signature(type(block).forward).return_annotation
    return arch.tuple_output and getattr(declared, "__name__", str(declared).split(".")[-1]) != "Tensor"


def producer_channels(link: Link, *, n: int, k: int, heads: int) -> list[int]:
    """For each input channel c of a consumer, the output channel of the producer that feeds it.

    Args:
        n: output channels of the producer (a norm: its width), k: input channels of the consumer,
        heads: number of query heads of the model.

    Layouts (h = c // head_dim, d = c % head_dim, head_dim = k / heads):
        same       c                      one to one
        kv         (h // (heads / kv_heads)) * head_dim + d   grouped-query v_proj; a producer
                   channel feeds heads / kv_heads consumer channels, which must share one scale
        qkv        2 k + c                fused rows [q; k; v]                  (GPT-2)
        qkv_heads  3 h head_dim + 2 head_dim + d   fused rows [q; k; v] per head  (NeoX, BLOOM)

    Returns: list of k ints in 0..n-1. Raises ValueError when the sizes do not fit the layout.
    """
    head_dim = k // heads
    if link.channels == "same" and n == k:
        return list(range(k))
    if link.channels == "kv" and k == heads * head_dim and n % head_dim == 0:
        kv_heads = n // head_dim
        if heads % kv_heads == 0:
            group = heads // kv_heads
            return [c // head_dim // group * head_dim + c % head_dim for c in range(k)]
    if link.channels == "qkv" and n == 3 * k:
        return [2 * k + c for c in range(k)]
    if link.channels == "qkv_heads" and n == 3 * k and k == heads * head_dim:
        return [(3 * (c // head_dim) + 2) * head_dim + c % head_dim for c in range(k)]
    raise ValueError(
        f"link {link.producer} -> {link.consumers}: layout {link.channels!r} does not fit "
        f"n={n}, k={k}, heads={heads}"
    )
