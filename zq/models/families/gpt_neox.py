"""GPT-NeoX (Pythia): rotary, q, k, v fused per head, attention and MLP in parallel or in series.

Either way each norm feeds one linear only, so both are producers.
"""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

GPT_NEOX = Arch(
    model_type="gpt_neox",
    blocks="layers",
    sites=(
        Site(name="qkv", kind="attention", linears=("attention.query_key_value",)),
        Site(name="out", kind="attention", linears=("attention.dense",)),
        Site(name="up", kind="mlp", linears=("mlp.dense_h_to_4h",)),
        Site(name="down", kind="mlp", linears=("mlp.dense_4h_to_h",)),
    ),
    links=(
        Link(
            producer="input_layernorm",
            consumers=("attention.query_key_value",),
            kind="norm",
        ),
        Link(
            producer="attention.query_key_value",
            consumers=("attention.dense",),
            kind="linear",
            channels="qkv_heads",
        ),
        Link(
            producer="post_attention_layernorm",
            consumers=("mlp.dense_h_to_4h",),
            kind="norm",
        ),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    tail=("final_layer_norm",),
)
