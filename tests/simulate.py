"""What a quantized model should compute, built from the original model: weights replaced by dequantized
ones, inputs of the quantized layers rounded token by token in a hook. Uses zq.numerics and nothing else
of zq, so that it can disagree with the pipeline, the exporters and the loaders."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zq.numerics.qtensor import quantize
from zq.recipe import Recipe
from zq.spec import Scheme

SchemeOf = Callable[[str], str | None]


def recipe(rules: str, *, scale: str = "mse", format: str = "auto", source: str = "random") -> Recipe:
    """Rules as "pattern = scheme" separated by semicolons; three windows of 16 random tokens."""
    lines = []
    for rule in rules.split(";"):
        match, _, text = (part.strip() for part in rule.partition("="))
        scheme = Scheme.parse(text)
        lines.append(f"  - match: '{match}'\n    weights: {scheme.weights}\n")
        if scheme.activations:
            lines.append(f"    activations: {scheme.activations}\n")
    return Recipe.parse(
        f"rules:\n{''.join(lines)}steps: [{{rtn: {{scale: {scale}}}}}]\nformat: {format}\n"
        f"calibration: {{source: {source}, samples: 3, length: 16}}\n"
    )


def auto_class(model: PreTrainedModel) -> type:
    """The Auto class that a user would take for this model."""
    name = type(model).__name__
    if name.endswith("ForMaskedLM"):
        return transformers.AutoModelForMaskedLM
    decoder = name.endswith(("ForCausalLM", "LMHeadModel"))
    return transformers.AutoModelForCausalLM if decoder else transformers.AutoModel


def block_linears(model: nn.Module) -> list[str]:
    """Every linear layer under a numbered list, which for these models are the blocks."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and re.search(r"\.\d+\.", f".{name}")
    ]


def simulated(
    folder: Path, scheme_of: SchemeOf, scale: str = "mse", *, library: bool = False
) -> PreTrainedModel:
    """The model in `folder` with each linear that `scheme_of(name)` names computing as if quantized.

    `library`: as compressed-tensors computes inside transformers, which takes one scale for a whole
    [tokens, K] input (OPT flattens its batch in front of the feed-forward layers); vLLM does not.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    for name in block_linears(model):
        text = scheme_of(name)
        if text is None:
            continue
        scheme, old = Scheme.parse(text), model.get_submodule(name)
        weight = old.weight.detach().T if isinstance(old, Conv1D) else old.weight.detach()
        n, k = weight.shape
        new = nn.Linear(k, n, bias=old.bias is not None, dtype=weight.dtype)
        new.weight.data = quantize(weight, scheme.weights, scale).dequantize(weight.dtype)
        if old.bias is not None:
            new.bias.data = old.bias.detach()
        if scheme.activations:
            assert str(scheme.activations) == "int8:token"
            new.register_forward_pre_hook(lambda module, args: (int8_tokens(args[0], library),))
        model.set_submodule(name, new)
    return model


def int8_tokens(x: Tensor, library: bool = False) -> Tensor:
    """127.5 levels on either side of zero, one float32 scale for each token."""
    rows = x.float()
    top = rows.abs().amax() if library and x.ndim == 2 else rows.abs().amax(-1, keepdim=True)
    step = top / 127.5
    step = torch.where(step == 0, torch.ones_like(step), step)
    return ((rows / step).round().clamp(-128, 127) * step).to(x.dtype)


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits, or the last hidden state of a model without a head."""
    out = model(input_ids=ids)
    return out.logits if "logits" in out else out.last_hidden_state


def stop_after(units: int) -> Callable[[dict[str, Any]], None]:
    """A `progress` that interrupts the run once so many units are done."""

    def stop(event: dict[str, Any]) -> None:
        if "unit" in event and event["done"] == units:
            raise KeyboardInterrupt

    return stop
