"""Token-wise dynamic activations, against compressed-tensors' dynamic quantization."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import ct_args, matrices
from zq.numerics.qtensor import fake_quantize_tokens
from zq.spec import TensorSpec


@given(matrices(), st.sampled_from(["int8:token", "e4m3fn:token", "e4m3fn:g8"]))
def test_tokens_equal_compressed_tensors_dynamic_quantization(x: torch.Tensor, text: str) -> None:
    spec = TensorSpec.parse(text)
    if spec.layout.kind == "group":  # which the library wants to divide K
        x = x[:, : x.shape[1] // 8 * 8]
        x = x[(x.unflatten(1, (-1, 8)).abs().amax(-1) > 0).all(-1)]
    else:
        x = x[x.abs().amax(-1) > 0]
    if not x.numel():
        return
    x = x.unsqueeze(0)  # the library takes [batch, tokens, K]
    args = ct_args(spec, dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Identity())
    assert torch.equal(fake_quantize_tokens(x, spec), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize("text", ["int8:token", "e4m3fn:g8", "e4m3fn:g5"])
def test_tokens_keep_shape_dtype_and_zero_rows(text: str) -> None:
    spec = TensorSpec.parse(text)
    x = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[0, 0, 0] = 0
    y = fake_quantize_tokens(x, spec)
    assert y.shape == x.shape
    assert y.dtype == torch.bfloat16
    assert not y[0, 0, 0].any()
    assert torch.equal(y[1, 2, 3], fake_quantize_tokens(x[1, 2, 3].reshape(1, -1), spec)[0])
    assert fake_quantize_tokens(x[:0], spec).shape == (0, 3, 5, 16)
