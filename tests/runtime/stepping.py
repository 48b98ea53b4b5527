"""Small models whose decode steps are made here as on a GPU, and what is watched in them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import zq
from tests.runtime.quantized import W4A8, in_float32, quantized
from tests.tiny import TINY, random_model, token_ids
from zq.runtime.blocks.around import Around

TOKENS = 6
FORBIDDEN = ("_local_scalar_dense", "nonzero", "lift_fresh")  # what a CUDA graph cannot capture


class NoHost(TorchDispatchMode):
    """Fails where a value goes to or comes from the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in FORBIDDEN), f"{func} in a step"
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    """Counts operators that launch something, and fails where the host is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        views = func.is_view or "view" in str(func)
        self.ops[str(func).rpartition(".")[0]] += not views
        return out


def padded(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    ids = token_ids(batch, length)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def without_windows(name: str) -> Any:
    config = TINY[name]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = None
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def stepping(name: str, scheme: str = W4A8, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Any:
    """(an optimized model that makes static steps, the same in float32, neither optimized nor stepping)"""
    config = without_windows(name)
    for key, value in changes.items():
        setattr(config, key, value)
    model = quantized(name, scheme, dtype, random_model(config, dtype))
    exact = in_float32(model)
    zq.optimize(model)
    model.zq_runner.on = True
    return model, exact


def generated(model: Any, tokens: int = TOKENS, **given: Any) -> tuple[Tensor, Tensor]:
    """(tokens, logits [T, B, V]) of greedy search"""
    out = model.generate(
        **given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def forced(exact: Any, sequences: Tensor, mask: Tensor) -> Tensor:
    """Logits [T, B, V] of a model for the tokens that another one has chosen."""
    ones = torch.ones_like(sequences[:, mask.shape[1] :])
    whole = torch.cat((mask, ones), 1)
    places = (whole.cumsum(1) - 1).clamp_min(0)
    takes = {} if exact.config.model_type == "bloom" else {"position_ids": places}
    with torch.no_grad():
        logits = exact(input_ids=sequences, attention_mask=whole, **takes).logits
    return logits[:, mask.shape[1] - 1 : -1].transpose(0, 1)


def torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on steps use torch's attention."""
    monkeypatch.setattr(Around, "fits", lambda *_: False)
