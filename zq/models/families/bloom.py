"""BLOOM: alibi, a norm on the embeddings, q, k, v fused per head, GELU MLP.

With `apply_residual_connection_post_layernorm` the residual is taken after the norm, which is then
no producer.
"""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

_RESIDUAL_BEFORE_NORM = (("apply_residual_connection_post_layernorm", False),)

BLOOM = Arch(
    model_type="bloom",
    blocks="h",
    sites=(
        Site(name="qkv", kind="attention", linears=("self_attention.query_key_value",)),
        Site(name="out", kind="attention", linears=("self_attention.dense",)),
        Site(name="up", kind="mlp", linears=("mlp.dense_h_to_4h",)),
        Site(name="down", kind="mlp", linears=("mlp.dense_4h_to_h",)),
    ),
    links=(
        Link(
            producer="input_layernorm",
            consumers=("self_attention.query_key_value",),
            kind="norm",
            when=_RESIDUAL_BEFORE_NORM,
        ),
        Link(
            producer="self_attention.query_key_value",
            consumers=("self_attention.dense",),
            kind="linear",
            channels="qkv_heads",
        ),
        Link(
            producer="post_attention_layernorm",
            consumers=("mlp.dense_h_to_4h",),
            kind="norm",
            when=_RESIDUAL_BEFORE_NORM,
        ),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    tail=("ln_f",),
    tuple_output=True,
)
