"""One literal per architecture; adding one is one file here and one name in this table."""

from __future__ import annotations

from zq.models.arch import Arch
from zq.models.families.bert import BERT
from zq.models.families.bloom import BLOOM
from zq.models.families.gpt2 import GPT2
from zq.models.families.gpt_neox import GPT_NEOX
from zq.models.families.gptj import GPTJ
from zq.models.families.llama import LLAMA
from zq.models.families.mistral import MISTRAL
from zq.models.families.opt import OPT
from zq.models.families.qwen2 import QWEN2
from zq.models.families.qwen3 import QWEN3
from zq.models.families.roberta import ROBERTA

FAMILIES: dict[str, Arch] = {
    arch.model_type: arch
    for arch in (
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        GPT2,
        OPT,
        GPTJ,
        GPT_NEOX,
        BLOOM,
        BERT,
        ROBERTA,
    )
}
