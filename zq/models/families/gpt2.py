"""GPT-2: pre-norm, learned positions, fused q|k|v in a Conv1D (weight [K, N], transposed), GELU MLP."""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

GPT2 = Arch(
    model_type="gpt2",
    blocks="h",
    sites=(
        Site(name="qkv", kind="attention", linears=("attn.c_attn",)),
        Site(name="out", kind="attention", linears=("attn.c_proj",)),
        Site(name="up", kind="mlp", linears=("mlp.c_fc",)),
        Site(name="down", kind="mlp", linears=("mlp.c_proj",)),
    ),
    links=(
        Link(producer="ln_1", consumers=("attn.c_attn",), kind="norm"),
        Link(
            producer="attn.c_attn",
            consumers=("attn.c_proj",),
            kind="linear",
            channels="qkv",
        ),
        Link(producer="ln_2", consumers=("mlp.c_fc",), kind="norm"),
    ),
    norms=("ln_1", "ln_2"),
    tail=("ln_f",),
)
