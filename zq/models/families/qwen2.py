"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and sliding windows in some layers.

The same modules, sites and links.
"""

from __future__ import annotations

from dataclasses import replace

from zq.models.families.llama import LLAMA

QWEN2 = replace(LLAMA, model_type="qwen2")
