"""What vLLM does with a linear layer, alone and with zq's plug-in beside it.

Shapes are those that a device holds: fused layers as one, and its part of them (zq/engines/served.py). The
choice between the kernels for packed weights is compared with vLLM's own by benchmarks/vllm_choice.py.
"""

from __future__ import annotations

from zq.engines.target import Target
from zq.export.config_groups import format_of
from zq.kernels.select import gemm_op, kernel_op
from zq.spec import Scheme, TensorSpec

AMX = "on a CPU with AMX vLLM rounds activations to INT8 in bf16; VLLM_CPU_INT4_W4A8=0 stops it"
IGNORED = "computes it with 16-bit activations"
NO_FP8 = f"before sm89 there is no FP8 arithmetic, so vLLM {IGNORED}"
MARLIN_FP8 = "FP8 weights (Marlin)"
Found = tuple[str, str | None, str | None]  # kernel, problem, warning


def vllm(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    sm = target.sm
    if target.plugin and (format == "zq" or (_narrow_int8(scheme, format) and plugin_takes(scheme, sm))):
        return _plugin(scheme, shape, sm)
    kernel, problem, warning = _vllm(target, format, scheme, shape)
    wide = rounded(scheme, kernel)
    said = [line for line in (warning, wide and f"vLLM {wide}") if line]
    return kernel, problem, "; ".join(said) or None


def rounded(scheme: Scheme, kernel: str) -> str | None:
    """What vLLM and SGLang do to float32 scales of packed weights and in Marlin; None: they keep them."""
    rounds = format_of(scheme) == "pack-quantized" or "Marlin" in kernel
    if not kernel or scheme.weights.scale_dtype != "fp32" or not rounds:
        return None
    return "rounds its float32 scales to the dtype of the model when it loads them"


def _vllm(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    w, a, sm = scheme.weights, scheme.activations, target.sm
    problems = [
        (0 < sm < 75, f"vLLM's quantized kernels need sm75 or newer, not sm{sm}; take such a device"),
        (
            format == "gptq" and not (w.symmetric and w.bits in (4, 8)),
            "vLLM reads GPTQ of 4 or 8 symmetric bits only",
        ),
    ]
    problem = next((reason for hit, reason in problems if hit), None)
    if problem:
        return "", problem, None
    if not w.info.is_int or w.layout.kind == "tile":
        return _vllm_fp8(scheme, shape, sm)
    if a is None:
        return _vllm_weights(scheme, shape, sm, format)
    if a.format not in ("int8", "e4m3fn") or (w.bits == 8 and a.format != "int8"):
        return "", f"zq knows no kernel of vLLM for {scheme}", None
    if w.bits == 8:
        if w.layout.kind == "group":
            return "", "vLLM has no INT8 x INT8 kernel with group scales; use int8:channel", None
        return ("INT8 (oneDNN)" if not sm else "INT8 (CUTLASS or Triton)"), None, None
    if a.format == "e4m3fn":
        n, k = shape
        if sm != 90 or w.bits != 4 or w.layout.size != 128 or n % 128 or k % 128 or not w.symmetric:
            return (
                "",
                "vLLM runs INT4 x FP8 on sm90 only, in symmetric groups of 128 with both sides of the weight "
                "multiples of 128",
                None,
            )
        return "INT4 x FP8 (CUTLASS)", None, "vLLM rounds its group scales to FP8 when it loads them"
    if not sm:
        kernel, problem, _ = _vllm_weights(scheme, shape, sm, format)
        ignored = (
            f"vLLM on a CPU without AMX, or in fp16, {IGNORED}, the same as --w4a16; with zq beside it "
            "(vllm:zq) it does not"
        )
        return kernel, problem, None if problem else ignored
    kernel = _weight_kernel(scheme, shape, sm)
    if "humming" in kernel:
        return f"INT{w.bits} x INT8 (humming)", None, None
    return (
        f"{kernel}, 16-bit activations",
        None,
        f"vLLM loads it and {IGNORED}; for real INT8 install zq beside it (vllm:zq) or add "
        "`--linear-backend humming` to `vllm serve`, or use --w4a16, which is as fast and loses less",
    )


def _narrow_int8(scheme: Scheme, format: str) -> bool:
    """What vLLM's own W4A8 would be; zq takes such layers over."""
    w, a = scheme.weights, scheme.activations
    narrow = w.info.is_int and w.bits < 8 and w.layout.kind in ("group", "channel")
    return format == "compressed-tensors" and narrow and a is not None and a.format == "int8"


def plugin_takes(scheme: Scheme, sm: int) -> bool:
    """Whether zq's plug-in computes a layer of compressed-tensors W4A8 in vLLM's place: always on a CPU, else
    where it has a kernel."""
    return sm == 0 or (sm >= 80 and gemm_op(scheme) is not None)


def plugin_refuses(spec: TensorSpec) -> str | None:
    """Why zq's vLLM plug-in does not serve such a weight, and what to do; None: it does."""
    again = "quantize again"
    problems = [
        (bool(spec.rank), f"'lorc={spec.rank}'", f"{again} without the step lorc"),
        (bool(spec.kept), f"'keep={spec.kept}'", f"{again} without the step proxy"),
        (bool(spec.inner), f"'pow2={spec.inner}'", f"{again} without pow2"),
        (spec.info.is_estimated, f"estimated values ({spec.format})", f"{again} to a fixed format"),
        (
            spec.layout.kind not in ("channel", "group", "tensor"),
            f"the layout '{spec.layout}'",
            f"{again} in groups (g64) or per channel",
        ),
    ]
    found = next(((what, remedy) for hit, what, remedy in problems if hit), None)
    return found and f"zq's vLLM plug-in does not serve {found[0]}; {found[1]}"


def _plugin(scheme: Scheme, shape: tuple[int, int], sm: int) -> Found:
    """What zq/runtime/served.py does with the layer."""
    w, a = scheme.weights, scheme.activations
    reason = plugin_refuses(w)
    op = kernel_op(scheme, shape[1], "bf16", sm) if sm else None
    if reason or op:
        rounded = op == "w4a16" and w.scale_dtype == "fp32"  # zq/runtime/served.py looks at the values
        warning = "zq dequantizes layers whose scales bfloat16 would round" if rounded else None
        return f"zq's kernel {op}", reason, warning
    if not sm and a is not None and a.format == "int8" and w.info.is_int and not w.extras:
        return f"INT{w.bits} x INT8, exact integers (zq)", None, None
    return (
        "weights dequantized when they are loaded (zq)",
        None,
        "zq has no kernel for it here, so it takes the memory of 16-bit weights and gains no speed",
    )


def _vllm_fp8(scheme: Scheme, shape: tuple[int, int], sm: int) -> Found:
    if scheme.weights.layout.kind == "tile":
        return _vllm_tiles(scheme, shape, sm)
    if scheme.weights.format != "e4m3fn":
        return "", f"zq knows no kernel of vLLM for {scheme.weights.format}", None
    if scheme.activations is None:
        if not sm:
            return "", "vLLM has no kernel for FP8 weights with 16-bit activations on a CPU", None
        return MARLIN_FP8, None, None
    if not sm:
        slow = "on a CPU without FP8 products vLLM can take minutes for a token of it; use --w8a8"
        return "FP8 (torch._scaled_mm, slow)", None, slow
    if sm < 89:
        return MARLIN_FP8, None, NO_FP8
    return "FP8 (CUTLASS)", None, None


def _vllm_tiles(scheme: Scheme, shape: tuple[int, int], sm: int) -> Found:
    """Read in vLLM 0.32; on a CPU run in it."""
    w, a, (n, k) = scheme.weights, scheme.activations, shape
    if w.format != "e4m3fn" or (w.layout.rows, w.layout.size) != (128, 128):
        return "", f"zq knows vLLM to serve tiles of FP8 and of 128x128 only, not {w}", None
    if not sm:
        if a is None or n % 32:
            return "", "vLLM on a CPU serves FP8 in tiles with FP8 activations and outputs in 32s only", None
        return (
            "FP8 weights in tiles (needs AMX)",
            None,
            f"vLLM on a CPU {IGNORED}, and does not load it where the CPU has no AMX",
        )
    if a is None:
        return MARLIN_FP8, None, None
    if sm < 90:
        if sm < 89:
            return MARLIN_FP8, None, NO_FP8
        return (
            MARLIN_FP8,
            None,
            f"before sm90 vLLM takes Marlin for FP8 in tiles and {IGNORED}; `--linear-backend triton` rounds "
            "them",
        )
    if n % 64 == 0 and k % 128 == 0:
        return (
            "FP8 in tiles (DeepGEMM)",
            None,
            "vLLM makes its scales powers of two when it loads them, and rounds the weights again; "
            "VLLM_USE_DEEP_GEMM_E8M0=0 keeps them",
        )
    return "FP8 in tiles (CUTLASS)", None, None


def _vllm_weights(scheme: Scheme, shape: tuple[int, int], sm: int, format: str) -> Found:
    w, (n, k) = scheme.weights, shape
    if sm:
        return _weight_kernel(scheme, shape, sm), None, None
    if w.bits != 4:
        return "", f"vLLM on a CPU has kernels for INT4 weights only, not {w.format}", None
    if n % 32 or k % 32:
        return "", f"vLLM on a CPU needs both sides of [{n}, {k}] to be multiples of 32", None
    return "INT4 weights (bf16 or fp16 only)", None, AMX


def _weight_kernel(scheme: Scheme, shape: tuple[int, int], sm: int) -> str:
    """What choose_mp_linear_kernel of vLLM takes for packed weights and 16-bit activations."""
    w, (n, k) = scheme.weights, shape
    size = w.layout.size if w.layout.kind == "group" else -1
    if sm == 90 and w.bits in (4, 8) and size in (-1, 64, 128) and k % 64 == 0 and n % 128 == 0:
        return f"INT{w.bits} weights (Machete)"
    if sm != 90 and size in (-1, 32, 64, 128) and (w.bits == 4 or (w.bits == 8 and w.symmetric)):
        return f"INT{w.bits} weights (Marlin)"
    if sm != 90 and w.bits == 4 and size in (256, k) and n % 8 == 0:
        return "INT4 weights (Triton)"
    return f"INT{w.bits} weights (humming)"
