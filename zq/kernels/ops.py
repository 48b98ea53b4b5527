"""The operators: `torch.ops.zq.NAME`, after `import zq.kernels.ops`. All are functional, new tensors out, but
store_kv, attend_token, attend_text and attend_text_codes, which also write into a cache.

x is [M, K] with K a multiple of 16; flatten leading dimensions. Weights are packed by zq.kernels.layout, n is
the number of outputs N (the packed weight is padded). On a CPU an operator is its reference
(zq.kernels.reference); on a CUDA device it runs on the current stream, without a synchronization, and inside
a CUDA graph once `zq.kernels.cuda.prepare(device)` has loaded the kernels. `dtype` is torch.int8 or
torch.float8_e4m3fn, `out` is torch.bfloat16 or torch.float16. Wrong shapes, dtypes and devices raise ZqError.

    quant_int8                      x / scale in INT8, scale [M], sum of each row [M]
    quant_fp8                       x / scale in e4m3, scale [M]
    quant_fp8_block128              the same with a scale for 128 values, [M, ceil(K / 128)]
    [add_]rms_norm_quant, [add_]layer_norm_quant, silu_mul_quant (gate_up [M, 2 K]), gelu_quant
                                    the function, then as above; rowsum is empty for FP8; add_ adds a residual
                                    first and returns the sum as well
    post_layer_norm_quant           add_layer_norm_quant that returns the norm in place of the sum
    w8a8_int8, w8a8_fp8             one scale per token and per channel
    fp8_block128                    1 x 128 activations, 128 x 128 weights
    w4a8_int8                       weight = ws (q s + o - 128), two-level; rowsum of quant_int8
    w4a8_int8_group, w4a8_fp8       weight = s (q - 8), a float scale per group; group 0: ws per channel
    w4a16, w8a16                    weight = s (q - zero) and 16-bit activations; output in the dtype of x
    store_kv                        one new token per row, or several: q of the fused product, k and v into
                                    the cache
    decode_attention                its attention over the cache (zq.kernels.checks_kv)
    attend_token                    both, and the rows that come out quantized, in one launch
    attend_text, attend_text_codes  attention of tokens to those of their own row, k and v into a cache
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zq.kernels import checks, checks_kv, launch, reference, reference_kv

QUANTIZED = "(Tensor q, Tensor scale, Tensor rowsum)"
QUANTIZED_ADD = "(Tensor q, Tensor scale, Tensor rowsum, Tensor sum)"
GEMM = "Tensor? bias, SymInt n"
TEXT = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor(a!)? k_to, Tensor(b!)? v_to, bool causal, float scale"
)
SCHEMAS = {
    "quant_int8": f"(Tensor x) -> {QUANTIZED}",
    "quant_fp8": "(Tensor x) -> (Tensor q, Tensor scale)",
    "quant_fp8_block128": "(Tensor x) -> (Tensor q, Tensor scale)",
    "rms_norm_quant": f"(Tensor x, Tensor weight, float eps, ScalarType dtype) -> {QUANTIZED}",
    "add_rms_norm_quant": "(Tensor x, Tensor residual, Tensor weight, float eps, ScalarType dtype) -> "
    + QUANTIZED_ADD,
    "layer_norm_quant": f"(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) -> {QUANTIZED}",
    "add_layer_norm_quant": "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, "
    f"ScalarType dtype) -> {QUANTIZED_ADD}",
    "post_layer_norm_quant": "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps, "
    "ScalarType dtype) -> (Tensor q, Tensor scale, Tensor rowsum, Tensor normed)",
    "silu_mul_quant": f"(Tensor gate_up, ScalarType dtype) -> {QUANTIZED}",
    "gelu_quant": f"(Tensor x, str approximate, ScalarType dtype) -> {QUANTIZED}",
    "w8a8_int8": f"(Tensor x, Tensor sx, Tensor w, Tensor ws, {GEMM}, ScalarType out) -> Tensor",
    "w8a8_fp8": f"(Tensor x, Tensor sx, Tensor w, Tensor ws, {GEMM}, ScalarType out) -> Tensor",
    "fp8_block128": f"(Tensor x, Tensor sx, Tensor w, {GEMM}, ScalarType out) -> Tensor",
    "w4a8_int8": "(Tensor x, Tensor sx, Tensor rowsum, Tensor w, Tensor ws, "
    f"{GEMM}, int group, ScalarType out) -> Tensor",
    "w4a8_int8_group": "(Tensor x, Tensor sx, Tensor w, Tensor? ws, "
    f"{GEMM}, int group, ScalarType out) -> Tensor",
    "w4a8_fp8": f"(Tensor x, Tensor sx, Tensor w, {GEMM}, int group, ScalarType out) -> Tensor",
    "w4a16": f"(Tensor x, Tensor w, Tensor? ws, {GEMM}, int group, bool asym) -> Tensor",
    "w8a16": f"(Tensor x, Tensor w, Tensor ws, {GEMM}) -> Tensor",
    "decode_attention": "(Tensor q, Tensor k, Tensor v, Tensor? k_scale, Tensor? v_scale, Tensor first, "
    "Tensor last, float scale, Tensor? slopes) -> Tensor",
    "store_kv": "(Tensor qkv, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor position, Tensor? cos, Tensor? sin, int heads, int kv_heads, str rope, Tensor? q_norm=None, "
    "Tensor? k_norm=None, float eps=1e-6, int tokens=1) -> Tensor",
    "attend_token": "(Tensor qkv, Tensor(a!) k, Tensor(b!) v, Tensor(c!)? k_scale, Tensor(d!)? v_scale, "
    "Tensor first, Tensor last, Tensor? cos, Tensor? sin, int heads, int kv_heads, str rope, Tensor? q_norm, "
    f"Tensor? k_norm, float eps, float scale, Tensor? slopes, ScalarType dtype) -> {QUANTIZED}",
    "attend_text": f"({TEXT}) -> Tensor",
    "attend_text_codes": f"({TEXT}, ScalarType dtype) -> {QUANTIZED}",
}
QUANT_OPS = tuple(name for name in SCHEMAS if "quant" in name)
KV_OPS = ("decode_attention", "store_kv", "attend_token", "attend_text", "attend_text_codes")
GEMM_OPS = tuple(name for name in SCHEMAS if name not in (*QUANT_OPS, *KV_OPS))


def _define(library: Any, name: str) -> None:
    check: Callable[..., checks.Outputs] = getattr(checks_kv if name in KV_OPS else checks, name)
    compute: Callable[..., Any] = getattr(reference_kv if name in KV_OPS else reference, name)

    def outputs(args: tuple[Any, ...]) -> list[Tensor]:
        return [args[0].new_empty(shape, dtype=dtype) for shape, dtype in check(*args)]

    def fake(*args: Any) -> Any:
        return _as_schema(outputs(args))

    def on_cpu(*args: Any) -> Any:
        check(*args)
        return compute(*args)

    def on_cuda(*args: Any) -> Any:
        return _as_schema(launch.run(name, args))

    library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, on_cpu, "CPU")
    library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"zq::{name}", fake, lib=library)


def _as_schema(made: list[Tensor]) -> Any:
    return made[0] if len(made) == 1 else tuple(made)


_library = torch.library.Library("zq", "FRAGMENT")  # kept: operators live as long as it does
for _name in SCHEMAS:
    _define(_library, _name)
