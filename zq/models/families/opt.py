"""OPT: learned positions, ReLU MLP; pre-norm, but post-norm with projected embeddings in OPT-350m.

Post-norm (`do_layer_norm_before` false): each norm also feeds the residual stream, so it is no
producer. ReLU(s x) = s ReLU(x) for s > 0, so fc1 -> fc2 is exact; Galactica uses this class with
GELU, hence the condition.
"""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

_FOLDABLE_NORM = (("do_layer_norm_before", True), ("layer_norm_elementwise_affine", True))

OPT = Arch(
    model_type="opt",
    blocks="decoder.layers",
    sites=(
        Site(
            name="qkv",
            kind="attention",
            linears=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ),
        Site(name="out", kind="attention", linears=("self_attn.out_proj",)),
        Site(name="up", kind="mlp", linears=("fc1",)),
        Site(name="down", kind="mlp", linears=("fc2",)),
    ),
    links=(
        Link(
            producer="self_attn_layer_norm",
            consumers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            kind="norm",
            when=_FOLDABLE_NORM,
        ),
        Link(producer="self_attn.v_proj", consumers=("self_attn.out_proj",), kind="linear"),
        Link(producer="final_layer_norm", consumers=("fc1",), kind="norm", when=_FOLDABLE_NORM),
        Link(
            producer="fc1",
            consumers=("fc2",),
            kind="linear",
            when=(("activation_function", "relu"),),
        ),
    ),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    tail=("decoder.final_layer_norm", "decoder.project_out"),
)
