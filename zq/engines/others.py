"""What SGLang, transformers, sentence-transformers and llama.cpp do with a linear layer."""

from __future__ import annotations

from zq.engines.target import Target
from zq.engines.vllm import MARLIN_FP8, Found, rounded
from zq.export import fp8, ggml
from zq.spec import Scheme


def sglang(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    kernel, problem = _sglang(target, format, scheme)
    said = rounded(scheme, kernel)
    return kernel, problem, said and f"SGLang {said}"


def _sglang(target: Target, format: str, scheme: Scheme) -> tuple[str, str | None]:
    w, a = scheme.weights, scheme.activations
    if a is not None and w.info.is_int and w.bits != 8 and target.sm:
        return "", "SGLang has no dense kernel for narrow weights with 8-bit activations; use --w4a16"
    if format == "gptq" and not w.symmetric:
        return "", "zq knows SGLang to read symmetric GPTQ only"
    if w.layout.kind == "tile":
        if w.format == "e4m3fn" and (w.layout.rows, w.layout.size) == (128, 128) and a and target.sm >= 89:
            return "FP8 in tiles", None
        return "", "zq knows SGLang to serve FP8 in tiles of 128x128 from sm89 on, activations too"
    if w.format == "e4m3fn" and target.sm:
        return ("FP8" if a and target.sm >= 89 else MARLIN_FP8), None
    if w.format == "int8" and a and w.layout.kind != "group" and target.sm:
        return "INT8", None
    if w.info.is_int and w.bits in (4, 8) and a is None and target.sm:
        return f"INT{w.bits} weights (Marlin)", None
    return "", f"zq knows no kernel of SGLang for {scheme} on this device"


def transformers(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    if format in ("gptq", "awq"):
        return "gptqmodel's, which must be installed", None, None
    if format == "zq":
        first = "from_pretrained" if target.engine == "transformers" else "SentenceTransformer"
        return "weights dequantized in each call", None, f"`import zq` must come before {first}"
    if format == "fp8":
        return _tiles(shape)
    w, unless = scheme.weights, "unless quantization_config=CompressedTensorsConfig(dequantize=True)"
    if w.info.is_int and not w.symmetric:
        why = "transformers with compressed-tensors 0.20 cannot load packed zero points"
        return "weights dequantized", None, f"{why} {unless}"
    said = []
    if w.scale_dtype == "fp32":
        said.append(f"transformers rounds its float32 scales to the dtype of the model {unless}")
    if target.engine == "sentence-transformers":
        said.append(
            "sentence-transformers 5.4 to 6.2 goes around the call that unpacks compressed-tensors; the card "
            "and docs/serving.md have the line that does it"
        )
    kernel = "weights dequantized, activations rounded in simulation: for measuring, not for speed"
    return kernel, None, "; ".join(said) or None


def _tiles(shape: tuple[int, int]) -> Found:
    """Read in transformers 5.24; dequantized run in it."""
    kernel = "FP8 in tiles from sm89 on (DeepGEMM or Triton, of the package kernels), else dequantized"
    ignored = "before sm89 and on a CPU transformers dequantizes it and leaves activations in 16 bits"
    ragged = any(side % fp8.SIZE for side in shape)
    others = f", with wrong tiles or not at all where {fp8.SIZE} does not divide {list(shape)}" * ragged
    return kernel, None, ignored + others


def llama_cpp(target: Target, format: str, scheme: Scheme, shape: tuple[int, int]) -> Found:
    reason = ggml.refuse(scheme, shape)
    return f"INT{scheme.weights.bits} blocks, activations rounded to INT8", reason, None
