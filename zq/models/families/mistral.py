"""Mistral: Llama with a sliding window; the same modules, sites and links."""

from __future__ import annotations

from dataclasses import replace

from zq.models.families.llama import LLAMA

MISTRAL = replace(LLAMA, model_type="mistral")
