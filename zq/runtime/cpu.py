"""Which product a quantized layer has on a CPU. The first row that fits:

    weights                  activations  dtype    needs           product                    bytes kept
    integers per channel     INT8         any      VNNI            torch._int_mm, exact       1
    (or of two levels)                             -               float32 in portions, exact 1
    4 bits in groups of 32,  INT8, none   bf16     AVX2, AVX-512   _weight_int4pack_mm; from  1.5
    64, 128, 256                                                   32 rows on bf16
    5 to 8 bits per channel  none         bf16     AVX2, AVX-512   _weight_int8pack_mm; from  1
                                                                   32 rows on bf16
    any other                any          any      -               in the dtype of the model, 2 or 4
                                                                   dequantized once

Bytes are those of a value of the weight, beside scales; a weight of the original has 2 or 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zq.numerics.qtensor import QTensor
from zq.runtime.integers import (
    has_int8,
    has_packed,
    integer_linear,
    integer_op,
    pack4,
    packed_linear,
    packed_op,
)
from zq.spec import TensorSpec

GROUPS = (32, 64, 128, 256)  # of torch's 4-bit product
ROWS = 16  # it takes multiples of


def cpu_linear(q: QTensor, activations: TensorSpec | None, dtype: torch.dtype) -> nn.Module | None:
    """The layer of the first row that fits; None: the last row."""
    spec = q.spec
    if not spec.info.is_int or spec.extras or spec.layout.kind not in ("channel", "group"):
        return None
    int8 = activations is not None and activations.format == "int8"
    if int8 and (spec.layout.kind == "channel" or spec.two_level):
        return IntegerLinear(q)
    if not int8 and activations is not None:
        return None
    held = dtype == torch.bfloat16 and torch.equal(q.scale.bfloat16().float(), q.scale.float())
    if not held or not spec.symmetric or spec.two_level or not has_packed():
        return None
    if spec.layout.kind == "group":
        fits = spec.bits <= 4 and spec.layout.size in GROUPS and q.shape[1] % spec.layout.size == 0
        return PackedLinear(q, int8) if fits and q.shape[0] % ROWS == 0 else None
    return PackedLinear(q, int8) if spec.bits > 4 else None


class IntegerLinear(nn.Module):
    """Codes int8 [N, K] and a scale per channel; INT8 activations. Two levels of scales become INT8 weights
    with a scale per channel, exactly."""

    takes = None

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.zero: Tensor | None
        codes, size = q.codes, q.spec.layout.size or 0
        if q.sub is not None:
            codes = (codes.short() * q.sub.short().repeat_interleave(size, 1)[:, : q.shape[1]]).to(torch.int8)
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", q.scale[:, 0].float().contiguous())
        self.register_buffer("zero", None if q.zero is None else q.zero[:, 0].contiguous())

    @property
    def way(self) -> str:
        return "exact integers, torch._int_mm" if has_int8() else "exact integers, in float32"

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        run = integer_op if torch.compiler.is_compiling() else integer_linear
        y = run(x.reshape(-1, x.shape[-1]), self.codes, self.scale, self.zero, bias)
        return y.reshape(*x.shape[:-1], self.codes.shape[0])


class PackedLinear(nn.Module):
    """Codes int8 [N, K] and scales bfloat16 [N, G], for many rows; 4-bit ones packed as well, for few."""

    takes = None

    def __init__(self, q: QTensor, quantize: bool) -> None:
        super().__init__()
        self.codes: Tensor
        self.scale: Tensor
        self.group, self.quantize = q.spec.layout.size or 0, quantize
        self.register_buffer("codes", q.codes.contiguous())
        self.register_buffer("scale", q.scale.bfloat16().contiguous())
        self.pack()

    def pack(self) -> None:
        """Once more, whenever rows have been joined or moved."""
        self.packed = pack4(self.codes, self.scale) if self.group else (None, None)

    @property
    def way(self) -> str:
        bits = 4 if self.group else 8
        return f"torch's {bits}-bit product" + (" of INT8 rows" if self.quantize else "")

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        run = packed_op if torch.compiler.is_compiling() else packed_linear
        rows = x.reshape(-1, x.shape[-1])
        y = run(rows, self.codes, self.scale, *self.packed, bias, self.group, self.quantize)
        return y.reshape(*x.shape[:-1], self.codes.shape[0])
