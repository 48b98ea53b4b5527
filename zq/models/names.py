"""The only place that knows how checkpoint keys and module names differ.

A parameter of the transformers model may be stored under
- its own name;
- the name without the base model's prefix (hub GPT-2 and BLOOM: "h.0..." for "transformer.h.0...")
  or with an extra one ("bert.encoder..." read into a plain BertModel);
- an old name: LayerNorm.gamma / LayerNorm.beta (early BERT), embed_out for lm_head (Pythia).
transformers applies the same rules when it loads (`conversion_mapping`, base_model_prefix).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

_OLD_ENDINGS = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
_OLD_BEGINNINGS = (("lm_head.", "embed_out."),)


@dataclass(frozen=True, kw_only=True)
class Match:
    """found: parameter name -> checkpoint key; missing: parameter names without a key."""

    found: dict[str, str]
    missing: tuple[str, ...]


def match(param_names: Iterable[str], keys: Container[str], base_prefix: str) -> Match:
    """Find the checkpoint key of every parameter.

    Args:
        param_names: full names in the transformers model.
        keys: the checkpoint's keys.
        base_prefix: the class's `base_model_prefix` ("model", "transformer", "bert", ...).
    """
    found: dict[str, str] = {}
    missing: list[str] = []
    for name in param_names:
        key = next((k for k in _spellings(name, base_prefix) if k in keys), None)
        if key is None:
            missing.append(name)
        else:
            found[name] = key
    return Match(found=found, missing=tuple(missing))


def extra(found: dict[str, str], keys: Iterable[str]) -> list[str]:
    """Checkpoint keys that no parameter uses (old buffers, other heads), in checkpoint order."""
    used = set(found.values())
    return [key for key in keys if key not in used]


def _spellings(name: str, base_prefix: str) -> Iterator[str]:
    prefix = f"{base_prefix}." if base_prefix else ""
    candidates = [name]
    if prefix:
        candidates.append(name.removeprefix(prefix) if name.startswith(prefix) else prefix + name)
    for candidate in candidates:
        yield candidate
        for new, old in _OLD_ENDINGS:
            if candidate.endswith(new):
                yield candidate.removesuffix(new) + old
        for new, old in _OLD_BEGINNINGS:
            if candidate.startswith(new):
                yield old + candidate.removeprefix(new)
