"""How the parts of a block are put together, for what runs it in another way than transformers does.

Paths are relative to the block, as in `zq.models.arch`; the linears are those of the family's sites `qkv`,
`out`, `up` and `down`. With x the input of the block:

    serial      h = x + attention(norm_1(x));  h + mlp(norm_2(h))
    parallel    x + attention(norm_1(x)) + mlp(norm_2(x)); one norm may feed both
    post        h = norm_1(x + attention(x));  norm_2(h + mlp(h))
    normed      y = norm_1(x);  h = y + attention(y);  z = norm_2(h);  z + mlp(z)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One family's block.

    order: see above. variants: (config attribute, value, order that it means).
    norms: paths of the first and the second; "" for the second where there is one only.
    attention, activation: paths. head_dim: attribute of the attention with the width of a head.
    gated: the MLP is down(act(gate) * up).
    per_head: rows of the fused qkv are [q, k, v] of each head, else q, k, v one behind the other.
    rope: "halves" (i with i + r / 2), "pairs" (2 i with 2 i + 1), or "".
    head_norms: norms of each query and key head, relative to the attention.
    unless: (config attribute, value) that make the block another one.
    """

    order: str
    norms: tuple[str, str]
    attention: str
    activation: str
    head_dim: str = "head_dim"
    variants: tuple[tuple[str, Any, str], ...] = ()
    gated: bool = False
    per_head: bool = False
    rope: str = ""
    head_norms: tuple[str, str] | None = None
    unless: tuple[tuple[str, Any], ...] = ()


LLAMA = Structure(
    order="serial",
    norms=("input_layernorm", "post_attention_layernorm"),
    attention="self_attn",
    activation="mlp.act_fn",
    gated=True,
    rope="halves",
)
BERT = Structure(
    order="post",
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    attention="attention.self",
    activation="intermediate.intermediate_act_fn",
    head_dim="attention_head_size",
    unless=(("is_decoder", True), ("add_cross_attention", True)),
)
STRUCTURES: dict[str, Structure] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": replace(LLAMA, head_norms=("q_norm", "k_norm")),
    "gpt2": Structure(
        order="serial",
        norms=("ln_1", "ln_2"),
        attention="attn",
        activation="mlp.act",
        unless=(("add_cross_attention", True), ("reorder_and_upcast_attn", True)),
    ),
    "opt": Structure(
        order="serial",
        variants=(("do_layer_norm_before", False, "post"),),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        attention="self_attn",
        activation="activation_fn",
    ),
    "gptj": Structure(
        order="parallel",
        norms=("ln_1", ""),
        attention="attn",
        activation="mlp.act",
        rope="pairs",
    ),
    "gpt_neox": Structure(
        order="parallel",
        variants=(("use_parallel_residual", False, "serial"),),
        norms=("input_layernorm", "post_attention_layernorm"),
        attention="attention",
        activation="mlp.act",
        head_dim="head_size",
        per_head=True,
        rope="halves",
    ),
    "bloom": Structure(
        order="serial",
        variants=(("apply_residual_connection_post_layernorm", True, "normed"),),
        norms=("input_layernorm", "post_attention_layernorm"),
        attention="self_attention",
        activation="mlp.gelu_impl",
        per_head=True,
        unless=(("slow_but_exact", True),),
    ),
    "bert": BERT,
    "roberta": BERT,
}


def structure_of(config: Any) -> Structure | None:
    """The structure of the blocks of a model of this config; None when they are none of those above."""
    found = STRUCTURES.get(config.model_type)
    if found is None or any(getattr(config, name, None) == value for name, value in found.unless):
        return None
    for name, value, order in found.variants:
        if getattr(config, name, None) == value:
            found = replace(found, order=order)
    return found
