from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from zq.numerics.metrics import sqnr_db, tensor_hash


def test_sqnr_against_numpy() -> None:
    x, y = torch.randn(50, 7).bfloat16(), torch.randn(50, 7).bfloat16()
    a, b = x.double().numpy(), y.double().numpy()
    assert sqnr_db(x, y) == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()), abs=2e-3)
    assert sqnr_db(x, x) == 200.0
    assert sqnr_db(torch.zeros(3), torch.ones(3)) < -1000


def test_hash_is_of_the_bytes_in_row_major_order() -> None:
    x = torch.randn(5, 6)
    assert tensor_hash(x) == hashlib.sha256(x.numpy().tobytes()).hexdigest()
    assert tensor_hash(x.T) == hashlib.sha256(x.T.contiguous().numpy().tobytes()).hexdigest()
    assert tensor_hash(torch.tensor(3.0)) == hashlib.sha256(np.float32(3).tobytes()).hexdigest()
    assert tensor_hash(x.to(torch.float8_e4m3fn)) != tensor_hash(x.to(torch.float8_e5m2))
