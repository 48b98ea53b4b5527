"""Configs of well-known models by name, for speed without a checkpoint. Sizes as their makers published them;
positions and vocabularies too, since the head and the cache cost time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zq.errors import ZqError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _llama(hidden: int, middle: int, layers: int, heads: int, keys: int, **more: Any) -> dict[str, Any]:
    given = {"vocab_size": 128256, "max_position_embeddings": 8192, "rope_theta": 500000.0, **more}
    return {
        "config": "LlamaConfig",
        "architecture": "LlamaForCausalLM",
        "hidden_size": hidden,
        "intermediate_size": middle,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        **given,
    }


def _gpt2(hidden: int, layers: int, heads: int, positions: int = 1024) -> dict[str, Any]:
    sizes = {"n_embd": hidden, "n_layer": layers, "n_head": heads, "n_positions": positions}
    return {"config": "GPT2Config", "architecture": "GPT2LMHeadModel", **sizes}


def _bert(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "config": "BertConfig",
        "architecture": "BertModel",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": _llama(4096, 14336, 32, 32, 8),
    "llama-3-70b": _llama(8192, 28672, 80, 64, 8),
    "llama-2-7b": _llama(
        4096, 11008, 32, 32, 32, vocab_size=32000, max_position_embeddings=4096, rope_theta=10000.0
    ),
    "smollm2-135m": _llama(
        *(576, 1536, 30, 9, 3), vocab_size=49152, rope_theta=100000.0, tie_word_embeddings=True
    ),
    "qwen3-8b": {
        **_llama(4096, 12288, 36, 32, 8, vocab_size=151936, max_position_embeddings=40960),
        "config": "Qwen3Config",
        "architecture": "Qwen3ForCausalLM",
        "head_dim": 128,
        "rope_theta": 1000000.0,
    },
    "gpt2": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "gpt-3-1.3b": _gpt2(2048, 24, 16, positions=2048),
    "gpt-j-6b": {
        "config": "GPTJConfig",
        "architecture": "GPTJForCausalLM",
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
    },
    "gpt-neox-20b": {
        "config": "GPTNeoXConfig",
        "architecture": "GPTNeoXForCausalLM",
        "hidden_size": 6144,
        "intermediate_size": 24576,
        "num_hidden_layers": 44,
        "num_attention_heads": 64,
        "vocab_size": 50432,
        "rotary_pct": 0.25,
    },
    "bert-base": _bert(768, 12, 12),
    "bert-large": _bert(1024, 24, 16),
}


def shape_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """The config of a shape, with `layers` blocks instead of its own. Raises ZqError for an unknown name."""
    if name not in SHAPES:
        raise ZqError(f"--shape {name} is unknown; allowed: {', '.join(SHAPES)}")
    import transformers

    values = dict(SHAPES[name])
    cls: Any = getattr(transformers, values.pop("config"))
    architecture = values.pop("architecture")
    if layers is not None:
        values[cls.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = layers
    return cls(**values, architectures=[architecture])
