"""Qwen3: Llama with an RMSNorm on each query and key head.

The head norms sit between q/k and the scores; they divide scales out and touch neither the input
of q, k, v nor v itself, so Llama's links hold.
"""

from __future__ import annotations

from dataclasses import replace

from zq.models.families.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    norms=(*LLAMA.norms, "self_attn.q_norm", "self_attn.k_norm"),
)
