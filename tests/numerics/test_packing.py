"""Dense packing, against compressed-tensors' packer and a bit string built one bit at a time."""

from __future__ import annotations

import math

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from zq.errors import ZqError
from zq.numerics.packing import pack, packed_words, unpack


def codes_of(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (n, k), generator=generator).to(torch.uint8)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(1, 140), st.integers(0, 2**31))
def test_round_trip_size_and_bits(bits: int, n: int, k: int, seed: int) -> None:
    codes = codes_of(n, k, bits, seed)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.nbytes == math.ceil(k * bits / 32) * 4 * n
    assert packed_words(k, bits) == words.shape[1]
    assert torch.equal(unpack(words, bits, k), codes)
    for row, packed in zip(codes.tolist(), words.tolist(), strict=True):
        stream = sum(code << i * bits for i, code in enumerate(row))
        assert sum((word & 0xFFFFFFFF) << 32 * w for w, word in enumerate(packed)) == stream


@given(st.integers(1, 8), st.integers(1, 70), st.integers(1, 140), st.integers(0, 2**31))
def test_bytes_are_those_of_compressed_tensors(bits: int, n: int, k: int, seed: int) -> None:
    codes = codes_of(n, k, bits, seed)
    signed = (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)
    words = pack(codes, bits)
    assert torch.equal(words, pack_to_int32(signed, bits))
    assert torch.equal(unpack_from_int32(words, bits, torch.Size((n, k))), signed)
    along_n = pack(codes.T.contiguous(), bits).T.contiguous()
    assert torch.equal(along_n, pack_to_int32(signed, bits, packed_dim=0))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_and_views(dtype: torch.dtype) -> None:
    codes = codes_of(6, 33, 3, 0)
    assert torch.equal(pack(codes.to(dtype), 3), pack(codes, 3))
    wide = codes_of(33, 6, 3, 1)
    assert torch.equal(pack(wide.T, 3), pack(wide.T.contiguous(), 3))


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(ZqError, match="allowed: 1 to 8"):
        pack(torch.zeros(1, 32, dtype=torch.uint8), bits)
    with pytest.raises(ZqError, match="allowed: 1 to 8"):
        unpack(torch.zeros(1, 1, dtype=torch.int32), bits, 4)


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ZqError, match="has 2 words; 8 codes of 4 bits need 1"):
        unpack(torch.zeros(1, 2, dtype=torch.int32), 4, 8)
