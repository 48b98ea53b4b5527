"""Build a transformers model without its weights, and put single tensors into it and out again.

Parameters live on the meta device (a shape and a dtype, no memory); buffers are real, because
nothing in a checkpoint restores them: rotary frequencies, GPT-J's sinusoids, BERT's position ids.
They are computed in float32 mode, as `from_pretrained` does, whatever the weights' dtype.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from zq.errors import ZqError
from zq.models.arch import Arch
from zq.models.find import model_class, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Device = torch.device | str


def empty_model(
    cls: type, config: PretrainedConfig, *, dtype: torch.dtype, device: Device, pooler: bool = True
) -> PreTrainedModel:
    """The model in eval mode: meta parameters of `dtype`, real buffers on `device`, nothing tied.

    Attention is "sdpa" where the class supports it, else "eager": what transformers itself picks,
    so that the outputs of a block are bit-equal to those in a normally loaded model.
    pooler=False leaves out the pooling layer where the class allows that (plain encoders).
    """
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    attention = "sdpa" if getattr(cls, "_supports_sdpa", False) else "eager"
    with init_empty_weights(include_buffers=False), no_init_weights():
        model = cls._from_config(  # type: ignore[attr-defined]
            copy.deepcopy(config),  # _from_config writes the dtype into the config it is given
            dtype=torch.float32,
            attn_implementation=attention,
            **class_options(cls, pooler=pooler),
        )
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        put(model, name, torch.empty(parameter.shape, dtype=dtype, device="meta"))
    for name, buffer in list(model.named_buffers()):
        put(model, name, buffer.to(device))
    return model.eval()


def stores_pooler(arch: Arch, keys: Iterable[str]) -> bool:
    """Whether a checkpoint with these keys has the pooler of its architecture, if that has one: a plain
    encoder may be stored without (many sentence encoders are)."""
    return not arch.pooler or any(f"{arch.pooler}." in key for key in keys)


def class_options(cls: type, *, pooler: bool) -> dict[str, bool]:
    """What to construct `cls` with, so that it has no pooler where there is none to load."""
    optional = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": False} if optional and not pooler else {}


def shapes_only(config: PretrainedConfig, where: str, *, pooler: bool = True) -> PreTrainedModel:
    """The model of a config, quantized or not, wholly on meta: for its names and shapes.

    pooler: as in `empty_model`.
    Raises ZqError naming `where` when the config contradicts itself.
    """
    bare = copy.deepcopy(config)
    if hasattr(bare, "quantization_config"):
        del bare.quantization_config  # type: ignore[attr-defined]
    cls = model_class(bare)
    try:
        with torch.device("meta"):
            return cls._from_config(bare, **class_options(cls, pooler=pooler))  # type: ignore[attr-defined]
    except Exception as error:  # heads that do not divide, an unknown activation, ...
        raise ZqError(
            f"{where}: transformers cannot build {cls.__name__} from this config "
            f"({one_line(error)}); correct config.json"
        ) from error


def put(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Replace the parameter or buffer at this full name; parameters never require a gradient."""
    owner, leaf = _owner(model, name)
    if leaf in owner._buffers:
        owner._buffers[leaf] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def drop(model: nn.Module, name: str) -> None:
    """Put the parameter at this full name back on meta; buffers stay."""
    owner, leaf = _owner(model, name)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(
            owner._parameters[leaf].to("meta"),  # type: ignore[union-attr]
            requires_grad=False,
        )


def get(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer at this full name."""
    owner, leaf = _owner(model, name)
    return getattr(owner, leaf)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf
