"""What an engine really does with a checkpoint: which kernel runs, what it ignores, what it refuses.

    vllm:0.33:sm90:tp=4      engine[:version][:device][:tp=N], device smNN or cpu
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
from zq.spec import Scheme

VERSIONS = {"vllm": "0.33", "sglang": "0.5", "transformers": "5", "llama.cpp": ""}
FORMATS = ("compressed-tensors", "zq", "gptq", "awq", "gguf")
SPLIT_INPUTS = ("out", "down")  # sites whose inputs tensor parallelism splits; of the others the outputs
IGNORED = "computes it with 16-bit activations"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint is to run. `sm` is the compute capability times ten; 0: a CPU."""

    engine: str
    version: str
    sm: int = 90
    tp: int = 1

    def __str__(self) -> str:
        device = f"sm{self.sm}" if self.sm else "cpu"
        parts = [self.engine, self.version] if self.version else [self.engine]
        if self.engine in ("vllm", "sglang"):
            parts += [device] + [f"tp={self.tp}"] * (self.tp > 1)
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
    version, sm, tp = VERSIONS[engine], 90, 1
    for part in rest:
        if found := re.fullmatch(r"sm_?(\d{2,3})a?", part):
            sm = int(found[1])
        elif part == "cpu":
            sm = 0
        elif found := re.fullmatch(r"tp=([1-9]\d{0,2})", part):
            tp = int(found[1])
        elif re.fullmatch(r"\d+(\.\d+)*", part):
            version = part
        else:
            raise ZqError(
                f"'{part}' in '{text}' is unknown; write ENGINE[:VERSION][:smNN or cpu][:tp=N], for example "
                "vllm:0.33:sm90:tp=2"
            )
    return Target(engine=engine, version=version, sm=sm, tp=tp)


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
        if heads % target.tp:
            verdict.problems.append(f"{heads} attention heads cannot be split between {target.tp} devices")
    return verdict


def _add(lines: list[str], line: str) -> None:
    if line not in lines:
        lines.append(line)


Found = tuple[str, str | None, str | None]  # kernel, problem, warning


def _vllm(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    w, a, sm = scheme.weights, scheme.activations, target.sm
    problems = [
        (format == "zq", "vLLM knows nothing of zq's own format; use --to compressed-tensors"),
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
        return kernel, problem, None if problem else f"vLLM on a CPU {IGNORED}; the same as --w4a16"
    kernel = _weight_kernel(scheme, shape, sm)
    if w.bits != 4 or "humming" in kernel:
        return f"INT{w.bits} x INT8 (humming)", None, None
    return (
        f"{kernel}, 16-bit activations",
        None,
        f"vLLM loads it and {IGNORED}; add `--linear-backend humming` to `vllm serve` for real INT8, or use "
        "--w4a16, which is as fast and loses less",
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
        elif n % tp:
            return [f"'{layer.name}': {n} outputs cannot be split between {tp} devices"]
    return []
