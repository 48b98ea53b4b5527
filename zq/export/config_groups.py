"""A config group of compressed-tensors (`quantization_config.config_groups.NAME`) and zq's Scheme.

    group(scheme, targets)  ->  {"targets", "weights", "input_activations", "output_activations", "format"}
    scheme_of(path, group)  ->  the Scheme again; errors name the field as the file has it

Spec: QuantizationArgs and QuantizationScheme of compressed-tensors 0.17 to 0.20.
"""

from __future__ import annotations

from typing import Any

from zq.errors import ZqError
from zq.export.fields import is_size, shown, wrong
from zq.spec import Layout, Scheme, TensorSpec

MIXED, NAIVE = "mixed-precision", "naive-quantized"  # each group has its own; of others, as their plain ones
FP32 = "torch.float32"  # `scale_dtype` of tiles whose scales are wider than the model
WEIGHTS, ACTIVATIONS = ("tensor", "channel", "group", "block"), ("token", "group")  # strategies that zq reads


def format_of(scheme: Scheme) -> str:
    """pack-quantized, int-quantized or float-quantized."""
    if not scheme.weights.info.is_int:
        return "float-quantized"
    return "int-quantized" if scheme.weights.bits == 8 and scheme.activations else "pack-quantized"


def group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    """The config group of a scheme that compressed-tensors holds."""
    return {
        "targets": targets,
        "weights": _weight_args(scheme.weights),
        "input_activations": _activation_args(scheme.activations),
        "output_activations": None,
        "format": format_of(scheme),
    }


def _weight_args(spec: TensorSpec) -> dict[str, Any]:
    layout = spec.layout
    return {
        "num_bits": spec.bits,
        "type": "int" if spec.info.is_int else "float",
        "symmetric": spec.symmetric,
        "strategy": "block" if layout.kind == "tile" else layout.kind,
        "group_size": layout.size if layout.kind == "group" else None,
        **({"block_structure": [layout.rows, layout.size]} if layout.kind == "tile" else {}),
        **({"scale_dtype": FP32} if spec.scale_dtype else {}),
        "dynamic": False,
    }


def _activation_args(spec: TensorSpec | None) -> dict[str, Any] | None:
    return spec and {
        "num_bits": 8,
        "type": "int" if spec.info.is_int else "float",
        "symmetric": True,
        "strategy": spec.layout.kind,
        "group_size": spec.layout.size,
        "dynamic": True,
    }


def scheme_of(path: str, group: dict[str, Any], kept: Any) -> Scheme:
    """The scheme of the config group at `path`; `kept` is the format of groups that have none of their own.
    Raises ZqError with the field that zq cannot read, its value and what it reads there."""
    acts = group.get("input_activations")
    if group.get("output_activations"):
        raise wrong(path, group, "output_activations", "null")
    weights = _spec(f"{path}.weights", _mapping(path, group, "weights"), WEIGHTS, dynamic=False)
    rounded = None
    if acts is not None:
        where = f"{path}.input_activations"
        rounded = _spec(where, _mapping(path, group, "input_activations"), ACTIVATIONS, dynamic=True)
    try:
        scheme = Scheme(weights, rounded)
    except ZqError as error:
        raise ZqError(f"{path}: {error}; quantize again") from None
    stored, plain = group.get("format") or kept, format_of(scheme)
    if stored not in (None, MIXED, plain) and (stored != NAIVE or plain == "pack-quantized"):
        raise ZqError(
            f"{path} is stored as {shown(stored)}, and zq reads {scheme} as {plain}; quantize again"
        )
    return scheme


def _mapping(path: str, args: dict[str, Any], key: str) -> dict[str, Any]:
    if not isinstance(args.get(key), dict):
        raise wrong(path, args, key, "a mapping")
    return args[key]


def _spec(path: str, args: dict[str, Any], strategies: tuple[str, ...], *, dynamic: bool) -> TensorSpec:
    """Of weights, whose scales are stored, or of activations, whose scales are made for each token."""
    if args.get("type") not in ("int", "float"):
        raise wrong(path, args, "type", '"int" or "float"')
    is_int = args["type"] == "int"
    widths = range(2, 9) if is_int and not dynamic else (8,)
    if not is_size(args.get("num_bits")) or args["num_bits"] not in widths:
        raise wrong(path, args, "num_bits", "8" if len(widths) == 1 else "whole numbers from 2 to 8")
    symmetric = args.get("symmetric", True)
    if symmetric is not True and (symmetric is not False or not is_int or dynamic):
        raise wrong(path, args, "symmetric", "true" if dynamic or not is_int else "true or false")
    if args.get("actorder") not in (None, False, "weight", "static"):
        raise wrong(path, args, "actorder", 'null, "weight" or "static"')
    if args.get("dynamic", False) is not dynamic:
        what = "true (scales made for each token)" if dynamic else "false (stored scales)"
        raise wrong(path, args, "dynamic", what)
    layout = _layout(path, args, strategies)
    return TensorSpec(
        format=f"int{args['num_bits']}" if is_int else "e4m3fn",
        layout=layout,
        symmetric=symmetric,
        scale_dtype="fp32" if layout.kind == "tile" and args.get("scale_dtype") == FP32 else None,
    )


def _layout(path: str, args: dict[str, Any], strategies: tuple[str, ...]) -> Layout:
    strategy = args.get("strategy")
    if strategy not in strategies:
        raise wrong(path, args, "strategy", ", ".join(f'"{name}"' for name in strategies))
    if strategy == "group":
        size = args.get("group_size")
        if not is_size(size) or size < 2:
            raise wrong(path, args, "group_size", "whole numbers from 2 on")
        return Layout("group", size)
    if strategy == "block":
        tile = args.get("block_structure")
        if not isinstance(tile, list) or len(tile) != 2 or not all(is_size(size) for size in tile):
            raise wrong(path, args, "block_structure", "two whole numbers from 1 on")
        return Layout("tile", tile[1], tile[0])
    return Layout(strategy)
