"""RoBERTa: BERT's block with positions counted from the padding id; the same sites and links."""

from __future__ import annotations

from dataclasses import replace

from zq.models.families.bert import BERT

ROBERTA = replace(BERT, model_type="roberta", positions_after_pad=True)
