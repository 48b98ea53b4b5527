"""GPT-J: rotary; attention and MLP in parallel, both reading the one norm of the block."""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

GPTJ = Arch(
    model_type="gptj",
    blocks="h",
    sites=(
        Site(
            name="qkv",
            kind="attention",
            linears=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        ),
        Site(name="out", kind="attention", linears=("attn.out_proj",)),
        Site(name="up", kind="mlp", linears=("mlp.fc_in",)),
        Site(name="down", kind="mlp", linears=("mlp.fc_out",)),
    ),
    links=(
        Link(
            producer="ln_1",
            consumers=("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"),
            kind="norm",
        ),
        Link(producer="attn.v_proj", consumers=("attn.out_proj",), kind="linear"),
    ),
    norms=("ln_1",),
    tail=("ln_f",),
    tuple_output=True,
)
