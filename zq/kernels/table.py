"""Every compile unit, by name."""

from __future__ import annotations

from zq.kernels.table_gemm import GEMM_UNITS
from zq.kernels.table_kv import KV_UNITS
from zq.kernels.table_optim import OPTIM_UNITS
from zq.kernels.unit import ARCHS, Unit

OPS = {  # OP of quant.cu -> operator, without its prefix
    "Plain": "quant",
    "RmsNorm": "rms_norm_quant",
    "AddRmsNorm": "add_rms_norm_quant",
    "LayerNorm": "layer_norm_quant",
    "AddLayerNorm": "add_layer_norm_quant",
    "PostLayerNorm": "post_layer_norm_quant",
    "SiluMul": "silu_mul_quant",
    "Gelu": "gelu_quant",
    "GeluNew": "gelu_quant",  # by tanh
}
OUTPUTS = {"Int8": ("int8", ARCHS), "E4m3": ("fp8", ARCHS[1:])}  # sm_80 converts nothing to e4m3


def _quant(op: str, kind: str, out: str, scales: str = "Token") -> Unit:
    short, archs = OUTPUTS[out]
    blocks = "_block128" if scales == "Block128" else ""
    return Unit(
        name=f"{op.lower()}_{short}{blocks}_{kind.replace('float', 'fp32')}",
        source="quant.cu",
        entries=("quantize_warp", "quantize_1", "quantize_4", "quantize_cluster", "quantize_long"),
        ops=(f"quant_{short}{blocks}" if op == "Plain" else OPS[op],),
        archs=archs,
        defines=(("OP", op), ("IN", kind), ("OUT", out), ("SCALES", scales)),
    )


QUANT_UNITS = (
    *(_quant(op, kind, out) for op in OPS for kind in ("bf16", "fp16") for out in OUTPUTS),
    *(_quant("Plain", "float", out) for out in OUTPUTS),
    *(_quant("Plain", kind, "E4m3", "Block128") for kind in ("bf16", "fp16", "float")),
)
UNITS: dict[str, Unit] = {unit.name: unit for unit in (*QUANT_UNITS, *GEMM_UNITS, *KV_UNITS, *OPTIM_UNITS)}
