"""Tiny random models of every supported architecture, each built from its real transformers config.

`TINY` maps a name to a config factory; a name is a model_type, with a suffix for a variant that
takes another path through the code (tied embeddings, post-norm, no head, ...). Hidden 64, 4 heads,
2 or 3 blocks, intermediate 128, vocabulary 160, 64 positions: every K divides by 32 and 64.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 160
POSITIONS = 64


def _llama_like(cls: type, architecture: str, **changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": POSITIONS,
        "tie_word_embeddings": False,
        "architectures": [architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
    }
    return cls(**(values | changes))


def _gpt_like(cls: type, architecture: str, **changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "n_positions": POSITIONS,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 128,
        "architectures": [architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return cls(**(values | changes))


def _opt(**changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "word_embed_proj_dim": 64,
        "architectures": ["OPTForCausalLM"],
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    return transformers.OPTConfig(**(values | changes))


def _neox(**changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "rotary_pct": 0.5,
        "tie_word_embeddings": False,
        "architectures": ["GPTNeoXForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.GPTNeoXConfig(**(values | changes))


def _bloom(**changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "n_layer": 2,
        "n_head": 4,
        "architectures": ["BloomForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.BloomConfig(**(values | changes))


def _bert_like(cls: type, architecture: str, **changes: Any) -> PretrainedConfig:
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "architectures": [architecture],
        "pad_token_id": 0,
    }
    return cls(**(values | changes))


TINY: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: _llama_like(transformers.LlamaConfig, "LlamaForCausalLM"),
    "llama-tied": lambda: _llama_like(
        transformers.LlamaConfig,
        "LlamaForCausalLM",
        tie_word_embeddings=True,
        attention_bias=True,
        mlp_bias=True,
    ),
    "mistral": lambda: _llama_like(transformers.MistralConfig, "MistralForCausalLM", sliding_window=6),
    "qwen2": lambda: _llama_like(
        transformers.Qwen2Config,
        "Qwen2ForCausalLM",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        tie_word_embeddings=True,
    ),
    "qwen3": lambda: _llama_like(
        transformers.Qwen3Config, "Qwen3ForCausalLM", head_dim=32, tie_word_embeddings=True
    ),
    "gpt2": lambda: _gpt_like(transformers.GPT2Config, "GPT2LMHeadModel"),
    "opt": lambda: _opt(),
    "opt-post": lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=32),
    "gptj": lambda: _gpt_like(
        transformers.GPTJConfig, "GPTJForCausalLM", rotary_dim=8, tie_word_embeddings=False
    ),
    "gpt_neox": lambda: _neox(),
    "gpt_neox-serial": lambda: _neox(use_parallel_residual=False),
    "bloom": lambda: _bloom(),
    "bloom-post": lambda: _bloom(apply_residual_connection_post_layernorm=True),
    "bert": lambda: _bert_like(transformers.BertConfig, "BertForMaskedLM"),
    "bert-model": lambda: _bert_like(transformers.BertConfig, "BertModel"),
    "bert-nopooler": lambda: _bert_like(transformers.BertConfig, "BertModel"),
    "roberta": lambda: _bert_like(transformers.RobertaConfig, "RobertaForMaskedLM", pad_token_id=1),
}


def options(name: str) -> dict[str, bool]:
    """What the model class is constructed with, beside the config."""
    return {"add_pooling_layer": False} if name.endswith("-nopooler") else {}


def build_tiny(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """A random model of this entry in eval mode; the same tensors for the same seed.

    Norm weights scatter around 1, biases around 0, everything else has a scale that keeps hidden
    states of order one, so that a swapped norm, a lost bias or a wrong layout shows.
    """
    return random_model(TINY[name](), dtype, seed, **options(name))


def random_model(
    config: PretrainedConfig, dtype: torch.dtype = torch.float32, seed: int = 0, **options: bool
) -> PreTrainedModel:
    """`build_tiny` for any config."""
    model = getattr(transformers, config.architectures[0])(config, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * (0.5 if "emb" in path or "wte" in path else 0.12))
            elif path.endswith("bias"):
                parameter.copy_(noise * 0.1)
            else:
                parameter.copy_(1 + 0.25 * noise)
    return model.to(dtype).eval()


def save_tiny(name: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Save `build_tiny(name)` as a safetensors checkpoint in `folder` and return what it holds."""
    model = build_tiny(name, dtype, seed)
    model.save_pretrained(folder)
    return model


def token_ids(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random int64 ids [batch, length], free of the special ids 0, 1 and 2."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
