"""Rows on their way into products: as they are, or quantized token by token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import zq.kernels.ops  # noqa: F401 (defines torch.ops.zq)


class Rows(NamedTuple):
    """x [M, K] in the dtype of the model, or codes (int8, e4m3) with their scale [M] float32 and, for int8,
    the sum of each row [M] int32."""

    x: Tensor
    scale: Tensor | None = None
    rowsum: Tensor | None = None


def quantized(rows: Rows, dtype: torch.dtype | None) -> Rows:
    """Rows in codes of `dtype` (torch.int8, torch.float8_e4m3fn); None and codes: as they are."""
    if dtype is None or rows.scale is not None:
        return rows
    if dtype == torch.int8:
        return Rows(*torch.ops.zq.quant_int8(rows.x))
    return Rows(*torch.ops.zq.quant_fp8(rows.x))
