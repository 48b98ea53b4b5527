"""Llama: pre-norm (RMSNorm), rotary, grouped-query attention, gated MLP.

The gate of the MLP is down(act(gate(x)) * up(x)): linear in `up`, so up -> down is exact for every
activation. v -> o is exact with one scale per key-value head channel (layout "kv").
"""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

LLAMA = Arch(
    model_type="llama",
    blocks="layers",
    sites=(
        Site(
            name="qkv",
            kind="attention",
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        Site(name="out", kind="attention", linears=("self_attn.o_proj",)),
        Site(name="up", kind="mlp", linears=("mlp.gate_proj", "mlp.up_proj")),
        Site(name="down", kind="mlp", linears=("mlp.down_proj",)),
    ),
    links=(
        Link(
            producer="input_layernorm",
            consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            kind="norm",
        ),
        Link(
            producer="self_attn.v_proj",
            consumers=("self_attn.o_proj",),
            kind="linear",
            channels="kv",
        ),
        Link(
            producer="post_attention_layernorm",
            consumers=("mlp.gate_proj", "mlp.up_proj"),
            kind="norm",
        ),
        Link(producer="mlp.up_proj", consumers=("mlp.down_proj",), kind="linear"),
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    tail=("norm",),
)
