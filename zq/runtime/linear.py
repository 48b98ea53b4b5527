"""QuantLinear: a linear layer whose weight is held as codes and scales.

    y = quantize_tokens(x) W^T + b,   W = dequantize(codes, scales) + A B

A B is the low-rank correction of the layers that have one (`lorc=r`); it sees the same quantized input.

This is the reference path: the weight is dequantized once, on the first call, into the dtype of the
input, and activations are quantized and dequantized in float32 before an ordinary matrix product. It is
what the accuracy figures of zq mean; fast kernels must agree with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zq.checkpoint.writer import CODES
from zq.export import native
from zq.models.layout import linear_shape
from zq.numerics.qtensor import QTensor, fake_quantize_tokens
from zq.spec import Scheme

DTYPES = {code: dtype for dtype, code in CODES.items()}


class QuantLinear(nn.Module):
    """Replaces an nn.Linear (or Conv1D) of `in_features` K and `out_features` N.

    Its buffers carry the names of the native format (zq/export/native.py), so a checkpoint of that
    format loads into it directly. x [..., K] -> [..., N] in the dtype of x.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: Scheme,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        for slot in native.slots("", scheme, (out_features, in_features), dtype):
            empty = torch.empty(slot.shape, dtype=DTYPES[slot.dtype], device=device)
            self.register_buffer(slot.name.removeprefix("."), empty)
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)
        self._dense: Tensor | None = None

    def set_weight(self, q: QTensor) -> None:
        """Take over a QTensor of the same scheme and shape."""
        for name, tensor in native.pack("", q, self.scheme).items():
            self.register_buffer(name.removeprefix("."), tensor)
        self._dense = None

    @property
    def qtensor(self) -> QTensor:
        shape = (self.out_features, self.in_features)
        return native.unpack("", lambda name: self.get_buffer(name.removeprefix(".")), self.scheme, shape)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight [N, K], kept after the first call."""
        place = self.get_buffer("weight_packed").device
        if self._dense is None or self._dense.dtype != dtype or self._dense.device != place:
            self._dense = self.qtensor.dequantize(dtype)
        return self._dense

    def forward(self, x: Tensor) -> Tensor:
        if self.scheme.activations is not None:
            x = fake_quantize_tokens(x, self.scheme.activations)
        return nn.functional.linear(x, self.dense(x.dtype), self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.scheme}, bias={self.bias is not None}"


def replace_linear(model: nn.Module, name: str, scheme: Scheme, dtype: torch.dtype) -> QuantLinear:
    """Put a QuantLinear in the place of the linear layer `name`; the bias moves over when there is one."""
    old: Any = model.get_submodule(name)
    n, k = linear_shape(old)
    bias = getattr(old, "bias", None)
    new = QuantLinear(k, n, scheme, bias=bias is not None, dtype=dtype, device=old.weight.device)
    if bias is not None:
        new.bias = nn.Parameter(bias.detach(), requires_grad=False)
    model.set_submodule(name, new)
    return new
