"""transformers loads and saves `quant_method: zq` through this quantizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from zq.export import native
from zq.models import names
from zq.models.layout import linear_shapes
from zq.runtime.linear import replace_linear
from zq.runtime.serving import may_be_saved, serve_linears

METHOD = "zq"


class ZqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: {"quant_method": "zq", "schemes": {scheme: [layer, ...]}}."""

    def __init__(
        self, schemes: dict[str, list[str]] | None = None, format_version: int = 1, **_: Any
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.schemes = schemes or {}
        self.format_version = format_version


class ZqQuantizer(HfQuantizer):
    """Puts QuantLinear modules on meta before the weights are loaded into their buffers."""

    requires_calibration = True  # never quantizes while loading; `zq quantize` does that

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        linears = linear_shapes(model)
        read: Any = self.quantization_config
        read.schemes = own_names(read.schemes, linears, model)  # as this class will save them again
        config = {"format_version": read.format_version, "schemes": read.schemes}
        for name, scheme in native.schemes(config, linears).items():
            dtype = model.get_submodule(name).weight.dtype
            replace_linear(model, name, scheme, dtype)
            parent = model.get_submodule(name.rpartition(".")[0])
            if not (parent._parameters or parent._buffers):
                # GPT-2 initialises c_proj.weight from the module around it, loaded or not.
                parent._is_hf_initialized = True

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """On a GPU the linears run zq's operators from the start."""
        places = {parameter.device for parameter in model.parameters()}
        if len(places) == 1 and next(iter(places)).type == "cuda":
            serve_linears(model, places.pop())
        return model

    def is_serializable(self) -> bool:
        """Raises ZqError when the codes are packed for kernels."""
        return may_be_saved(self)

    @property
    def is_trainable(self) -> bool:
        return False


def own_names(schemes: dict[str, list[str]], linears: Iterable[str], model: Any) -> dict[str, list[str]]:
    """The layers of each scheme under the names that this class gives them.

    The checkpoint may be of the class with a head ("transformer.h.0...") and `model` the base model alone
    ("h.0..."), or the other way round. A quantized head is dropped where the class has none, as transformers
    drops its tensors. Names that fit nothing stay, to be refused.
    """
    prefix = str(model.base_model_prefix)
    listed = {layer for layers in schemes.values() for layer in layers}
    found = names.match(linears, listed, prefix).found
    own = {key: name for name, key in found.items()}
    stripped = any(key == f"{prefix}.{name}" for key, name in own.items())
    heads = {layer for layer in listed if stripped and not layer.startswith(f"{prefix}.")}
    return {
        scheme: [own.get(layer, layer) for layer in layers if layer not in heads]
        for scheme, layers in schemes.items()
    }


if METHOD not in AUTO_QUANTIZER_MAPPING:  # transformers raises when a name is registered twice
    register_quantization_config(METHOD)(ZqConfig)
    register_quantizer(METHOD)(ZqQuantizer)
