"""What an engine really does with a checkpoint: which kernel runs, what it ignores, what it refuses.

    vllm:0.33:sm90:tp=4      engine[:version][:device][:tp=N], device smNN or cpu
    vllm:zq                  vLLM with zq installed beside it, so with zq's plug-in (zq/plugins/vllm.py)
    sglang, transformers, llama.cpp

Facts, not guesses: read in the sources of the version that each engine's entry names, or run (docs/serving.md
says which). For another version they may be out of date, and zq says so.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from zq.errors import ZqError
from zq.export import ggml
from zq.kernels.select import gemm_op, kernel_op
from zq.spec import Scheme, TensorSpec

VERSIONS = {"vllm": "0.33", "sglang": "0.5", "transformers": "5", "llama.cpp": ""}
FORMATS = ("compressed-tensors", "zq", "gptq", "awq", "gguf")
SPLIT_INPUTS = ("out", "down")  # sites whose inputs tensor parallelism splits; of the others the outputs
IGNORED = "computes it with 16-bit activations"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint is to run. `sm` is the compute capability times ten; 0: a CPU. `plugin`: zq's."""

    engine: str
    version: str
    sm: int = 90
    tp: int = 1
    plugin: bool = False

    def __str__(self) -> str:
        device = f"sm{self.sm}" if self.sm else "cpu"
        parts = [self.engine, self.version] if self.version else [self.engine]
        if self.engine in ("vllm", "sglang"):
            parts += [device] + [f"tp={self.tp}"] * (self.tp > 1) + ["zq"] * self.plugin
        return ":".join(parts)


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A linear layer of the model. `site` is the name of its place in a block (zq/models/arch.py), with the
    block: the layers of one site are fused by servers. None outside the blocks."""

    name: str
    shape: tuple[int, int]
    scheme: Scheme | None
    site: tuple[int, str] | None = None


@dataclass
class Verdict:
    """kernels: what runs, by scheme; problems: why it does not load; warnings: what is not as it says."""

    target: Target
    kernels: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def parse(text: str) -> Target:
    """Raises ZqError naming the part that is wrong."""
    engine, *rest = text.split(":")
    if engine not in VERSIONS:
        raise ZqError(f"engine '{engine}' in '{text}' is unknown; allowed: {', '.join(VERSIONS)}")
    version, sm, tp, plugin = VERSIONS[engine], 90, 1, False
    for part in rest:
        if found := re.fullmatch(r"sm_?(\d{2,3})a?", part):
            sm = int(found[1])
        elif part == "cpu":
            sm = 0
        elif found := re.fullmatch(r"tp=([1-9]\d{0,2})", part):
            tp = int(found[1])
        elif part == "zq" and engine == "vllm":
            plugin = True
        elif re.fullmatch(r"\d+(\.\d+)*", part):
            version = part
        else:
            raise ZqError(
                f"'{part}' in '{text}' is unknown; write ENGINE[:VERSION][:smNN or cpu][:tp=N], for example "
                "vllm:0.33:sm90:tp=2, or vllm:zq with zq beside vLLM"
            )
    return Target(engine=engine, version=version, sm=sm, tp=tp, plugin=plugin)


def judge(target: Target, format: str, layers: Sequence[Layer], heads: int = 0) -> Verdict:
    """What this engine makes of these layers in a checkpoint of this format; `heads`: attention heads of the
    model, 0 when unknown."""
    verdict = Verdict(target)
    known = VERSIONS[target.engine]
    if known and not f"{target.version}.".startswith(f"{known}."):
        verdict.warnings.append(
            f"what zq knows is {target.engine} {known}; {target.version} may choose other kernels"
        )
    look = {"vllm": _vllm, "sglang": _sglang, "transformers": _transformers, "llama.cpp": _llama_cpp}
    for layer in layers:
        if layer.scheme is None:
            continue
        kernel, problem, warning = look[target.engine](target, format, layer.scheme, layer.shape)
        if problem:
            _add(verdict.problems, f"{layer.scheme}: {problem}")
        elif kernel:
            verdict.kernels.setdefault(str(layer.scheme), kernel)
        if warning:
            _add(verdict.warnings, f"{layer.scheme}: {warning}")
    if target.engine in ("vllm", "sglang"):
        verdict.problems += _fused(layers)
        verdict.problems += _split(layers, target.tp)
        if target.plugin and format == "zq":
            verdict.problems += [
                f"'{layer.name}' is outside the blocks, and zq's vLLM plug-in serves linear layers in them"
                for layer in layers
                if layer.scheme is not None and layer.site is None
            ]
        if heads % target.tp:
            verdict.problems.append(f"{heads} attention heads cannot be split between {target.tp} devices")
    return verdict


def _add(lines: list[str], line: str) -> None:
    if line not in lines:
        lines.append(line)


Found = tuple[str, str | None, str | None]  # kernel, problem, warning


def _vllm(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    w, a, sm = scheme.weights, scheme.activations, target.sm
    if target.plugin and (format == "zq" or (_narrow_int8(scheme, format) and plugin_takes(scheme, sm))):
        return _plugin(scheme, shape, sm)
    problems = [
        (
            format == "zq",
            "vLLM alone knows nothing of zq's own format; install zq beside it (vllm:zq), or use --to "
            "compressed-tensors",
        ),
        (format == "gguf", "vLLM reads no GGUF without a plug-in; use --to compressed-tensors"),
        (0 < sm < 75, f"vLLM's quantized kernels need sm75 or newer, not sm{sm}"),
        (
            format == "gptq" and not (w.symmetric and w.bits in (4, 8)),
            "vLLM reads GPTQ of 4 or 8 symmetric bits only; use --to compressed-tensors",
        ),
    ]
    problem = next((reason for hit, reason in problems if hit), None)
    if problem:
        return "", problem, None
    if not w.info.is_int:
        return _vllm_fp8(scheme, sm)
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
        ignored = f"vLLM on a CPU {IGNORED}, the same as --w4a16; with zq beside it (vllm:zq) it does not"
        return kernel, problem, None if problem else ignored
    kernel = _weight_kernel(scheme, shape, sm)
    if w.bits != 4 or "humming" in kernel:
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
        return f"zq's kernel {op}", reason, None
    if not sm and a is not None and a.format == "int8" and w.info.is_int and not w.extras:
        return f"INT{w.bits} x INT8, exact integers (zq)", None, None
    return (
        "weights dequantized when they are loaded (zq)",
        None,
        "zq has no kernel for it here, so it takes the memory of 16-bit weights and gains no speed",
    )


def _vllm_fp8(scheme: Scheme, sm: int) -> Found:
    if scheme.weights.format != "e4m3fn":
        return "", f"zq knows no kernel of vLLM for {scheme.weights.format}", None
    if scheme.activations is None:
        if not sm:
            return "", "vLLM has no kernel for FP8 weights with 16-bit activations on a CPU", None
        return "FP8 weights (Marlin)", None, None
    if not sm:
        return "FP8 (torch._scaled_mm, slow)", None, None
    if sm < 89:
        return "FP8 weights (Marlin)", None, f"before sm89 there is no FP8 arithmetic, so vLLM {IGNORED}"
    return "FP8 (CUTLASS)", None, None


def _vllm_weights(scheme: Scheme, shape: tuple[int, int], sm: int, format: str) -> Found:
    w, (n, k) = scheme.weights, shape
    if sm:
        return _weight_kernel(scheme, shape, sm), None, None
    if w.bits != 4:
        return "", f"vLLM on a CPU has kernels for INT4 weights only, not {w.format}", None
    if n % 32 or k % 32:
        return "", f"vLLM on a CPU needs both sides of [{n}, {k}] to be multiples of 32", None
    return "INT4 weights (bf16 or fp16 only)", None, None


def _weight_kernel(scheme: Scheme, shape: tuple[int, int], sm: int) -> str:
    """What choose_mp_linear_kernel of vLLM takes for packed weights and 16-bit activations."""
    w, (n, k) = scheme.weights, shape
    size = w.layout.size if w.layout.kind == "group" else -1
    common = w.bits in (4, 8)
    if sm == 90 and common and size in (-1, 64, 128) and k % 64 == 0 and n % 128 == 0:
        return f"INT{w.bits} weights (Machete)"
    if sm != 90 and common and size in (-1, 32, 64, 128):
        return f"INT{w.bits} weights (Marlin)"
    return f"INT{w.bits} weights (humming or Triton)"


def _sglang(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    w, a = scheme.weights, scheme.activations
    if format in ("zq", "gguf"):
        return "", f"zq does not know SGLang to read format {format}; use --to compressed-tensors", None
    if a is not None and w.info.is_int and w.bits != 8:
        return "", "SGLang has no dense kernel for narrow weights with 8-bit activations; use --w4a16", None
    if format == "gptq" and not w.symmetric:
        return "", "zq knows SGLang to read symmetric GPTQ only; use --to compressed-tensors", None
    if w.format == "e4m3fn" and target.sm:
        return ("FP8" if a and target.sm >= 89 else "FP8 weights"), None, None
    if w.format == "int8" and a and w.layout.kind != "group" and target.sm:
        return "INT8", None, None
    if w.info.is_int and w.bits in (4, 8) and a is None and target.sm:
        return f"INT{w.bits} weights (Marlin)", None, None
    return "", f"zq knows no kernel of SGLang for {scheme} on this device", None


def _transformers(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    if format == "gguf":
        return "", "transformers turns GGUF into floats when it loads it; use --to compressed-tensors", None
    if format in ("gptq", "awq"):
        return "gptqmodel's, which must be installed", None, None
    if format == "zq":
        return "weights dequantized in each call", None, "`import zq` must come before from_pretrained"
    if scheme.weights.info.is_int and not scheme.weights.symmetric:
        why = "transformers with compressed-tensors 0.20 cannot load packed zero points"
        return (
            "weights dequantized",
            None,
            f"{why} unless quantization_config=CompressedTensorsConfig(dequantize=True)",
        )
    return "weights dequantized, activations rounded in simulation: for measuring, not for speed", None, None


def _llama_cpp(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    if format != "gguf":
        return "", f"llama.cpp reads GGUF files, not {format}; use --to gguf", None
    reason = ggml.refuse(scheme, shape)
    return f"INT{scheme.weights.bits} blocks, activations rounded to INT8", reason, None


def _fused(layers: Sequence[Layer]) -> list[str]:
    """Servers fuse the layers of a site into one, which has one scheme."""
    sites: dict[tuple[int, str], list[Layer]] = defaultdict(list)
    for layer in layers:
        if layer.site is not None:
            sites[layer.site].append(layer)
    for members in sites.values():
        found = {str(layer.scheme) if layer.scheme else "as it is" for layer in members}
        if len(found) > 1:
            names = ", ".join(layer.name for layer in members)
            return [
                f"{names} are fused into one layer and need one scheme, not {' and '.join(sorted(found))}"
            ]
    return []


def _split(layers: Sequence[Layer], tp: int) -> list[str]:
    """Tensor parallelism splits a weight between `tp` devices, and with it its groups."""
    for layer in layers:
        if tp == 1 or layer.scheme is None or layer.site is None:
            continue
        n, k = layer.shape
        w = layer.scheme.weights
        size = w.layout.size or 1 if w.layout.kind == "group" else 1
        if layer.site[1] in SPLIT_INPUTS:
            if k % tp or k // tp % size:
                return [
                    f"'{layer.name}': {k} inputs in groups of {size} cannot be split between {tp} devices"
                ]
            if w.bits < 8 and k // tp * w.bits % 32:
                return [f"'{layer.name}': {k // tp} inputs of {w.bits} bits end inside a packed 32-bit word"]
        elif n % tp:
            return [f"'{layer.name}': {n} outputs cannot be split between {tp} devices"]
    return []
