"""The classes that vLLM calls; imported by zq.plugins.vllm.register, where vLLM is."""
# pyright: reportMissingImports=false

from __future__ import annotations

import inspect
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedColumnParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

from zq.engines import plugin_takes
from zq.errors import ZqError
from zq.kernels import bundle
from zq.plugins.sharding import Part, Shard, assemble, parts
from zq.plugins.vllm import METHOD, TAKEN, find, layer_schemes, log, scheme_of, taken
from zq.runtime.served import serve
from zq.spec import Scheme

_said: set[str] = set()


def register() -> None:
    """Idempotent. Raises AttributeError when vLLM has no hook to take checkpoints over."""
    for cls, hook in (
        (CompressedTensorsConfig, "get_scheme_dict"),
        (QuantizationConfig, "override_quantization_method"),
    ):
        getattr(cls, hook)
    inspect.signature(CompressedTensorsConfig.get_scheme_dict).bind(None, None, "name")
    register_quantization_config(METHOD)(ZqConfig)
    register_quantization_config(TAKEN)(TakenConfig)


def capability() -> int:
    """Compute capability of the device times ten; 0 for a CPU, 1 for what zq knows nothing of."""
    if current_platform.is_cpu():
        return 0
    found = current_platform.get_device_capability() if current_platform.is_cuda() else None
    return found.to_int() if found is not None else 1


def say_once(line: str) -> None:
    if line not in _said:
        _said.add(line)
        log.info("%s", line)


@register_weight_loader_v2_supported_method
class ZqLinearMethod(LinearMethodBase):
    """A linear layer of `scheme`, stored as "zq" or as "compressed-tensors"."""

    def __init__(self, scheme: Scheme, storage: str, prefix: str) -> None:
        self.scheme, self.storage, self.prefix = scheme, storage, prefix

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **more: Any,
    ) -> None:
        shard = Shard(
            name=self.prefix,
            sizes=tuple(output_partition_sizes),
            k=input_size_per_partition,
            whole_n=output_size,
            whole_k=input_size,
        )
        self.shard, self.dtype = shard, params_dtype
        self.parts = parts(self.scheme.weights, shard, self.storage)
        for part in self.parts:
            made = parameter(part, self.scheme.weights.bits, more["weight_loader"])
            layer.register_parameter(part.name, made)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        tensors = {part.name: getattr(layer, part.name).data for part in self.parts}
        for name in tensors:
            delattr(layer, name)
        q = assemble(self.scheme.weights, self.shard, self.storage, tensors)
        layer.served = serve(q, self.scheme.activations, self.dtype)
        say_once(f"zq computes {self.scheme} as {layer.served.way}")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.served(x, bias)


def parameter(part: Part, bits: int, loader: Any) -> BasevLLMParameter:
    """The parameter class that cuts and fuses this kind of tensor, empty."""
    data = torch.zeros(part.shape, dtype=part.dtype)
    rows: dict[str, Any] = {"data": data, "weight_loader": loader, "output_dim": 0}
    words = {"packed_factor": Fraction(32, bits)}
    if part.kind == "packed":
        return PackedvLLMParameter(input_dim=1, packed_dim=1, **words, **rows)
    if part.kind == "packed_n":
        return PackedvLLMParameter(input_dim=1, packed_dim=0, **words, **rows)
    if part.kind == "packed_channel":
        return PackedColumnParameter(packed_dim=0, **words, **rows)
    if part.kind == "group":
        return GroupQuantScaleParameter(input_dim=1, **rows)
    if part.kind == "channel":
        return ChannelQuantScaleParameter(**rows)
    cls = PerTensorScaleParameter if part.kind == "tensor" else BasevLLMParameter
    return cls(data=data, weight_loader=loader)


class ZqConfig(QuantizationConfig):
    """`quantization_config` of zq's own format (zq/export/native.py)."""

    def __init__(self, schemes: dict[str, Scheme]) -> None:
        super().__init__()
        self.schemes = schemes

    def get_name(self) -> str:
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ZqConfig:
        return cls(layer_schemes(config))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.schemes = hf_to_vllm_mapper.apply_dict(self.schemes)

    def maybe_update_config(self, model_name: str, *args: Any, **more: Any) -> None:
        use_bundle(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> LinearMethodBase | None:
        scheme = find(self.schemes, prefix, self.packed_modules_mapping)
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod() if scheme is None else ZqLinearMethod(scheme, "zq", prefix)
        if scheme is not None:
            raise ZqError(
                f"'{prefix}' is {scheme}, and zq's vLLM plug-in serves quantized linear layers only; "
                "quantize again with a rule that skips it"
            )
        return None


class TakenConfig(CompressedTensorsConfig):
    """compressed-tensors with the layers that are W4A8 computed by zq."""

    def get_name(self) -> str:
        return TAKEN

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        found = taken(hf_quant_cfg, capability()) if user_quant in (None, TAKEN) else []
        for scheme in found:
            say_once(
                f"zq takes over the layers that are {scheme}: vLLM alone would compute them with 16-bit "
                "activations (--quantization compressed-tensors leaves them to vLLM)"
            )
        return TAKEN if found else None

    def maybe_update_config(self, model_name: str, *args: Any, **more: Any) -> None:
        super().maybe_update_config(model_name, *args, **more)
        use_bundle(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        if isinstance(layer, LinearBase) and self.transform_config is None:
            found = self.get_scheme_dict(layer, prefix) or {}
            scheme = scheme_of(
                _plain(found.get("weights")), _plain(found.get("input_activations")), found.get("format")
            )
            if scheme is not None and plugin_takes(scheme, capability()):
                return ZqLinearMethod(scheme, "compressed-tensors", prefix)
        return super().get_quant_method(layer, prefix)


def _plain(args: Any) -> Any:
    """pydantic QuantizationArgs -> a mapping with plain values."""
    return args if args is None else args.model_dump(mode="json")


def use_bundle(model: str) -> None:
    """Kernels that lie beside the weights (zq/kernels/bundle.py)."""
    if current_platform.is_cuda() and Path(model).is_dir():
        bundle.use(Path(model))
