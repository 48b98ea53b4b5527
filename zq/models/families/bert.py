"""BERT, and sentence encoders built on it: post-norm, learned positions, GELU MLP.

Both norms feed the residual stream and the next linear, so value -> output is the only link.
"""

from __future__ import annotations

from zq.models.arch import Arch, Link, Site

BERT = Arch(
    model_type="bert",
    blocks="encoder.layer",
    sites=(
        Site(
            name="qkv",
            kind="attention",
            linears=("attention.self.query", "attention.self.key", "attention.self.value"),
        ),
        Site(name="out", kind="attention", linears=("attention.output.dense",)),
        Site(name="up", kind="mlp", linears=("intermediate.dense",)),
        Site(name="down", kind="mlp", linears=("output.dense",)),
    ),
    links=(
        Link(
            producer="attention.self.value",
            consumers=("attention.output.dense",),
            kind="linear",
        ),
    ),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    pooler="pooler",
    encoder=True,
)
