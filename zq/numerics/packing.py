"""Pack: k-bit codes, k = 1..8, densely in 32-bit words, row by row.

Code i of a row occupies bits [i*k, (i+1)*k) of the row's bit stream, least significant bit first;
word w holds bits [32w, 32w + 32), little-endian. 32 codes fill exactly k words; a code may straddle
two words; a row ends on a word boundary: ceil(K*k/32) words. This is the layout of
compressed-tensors' pack-quantized format (for k dividing 32 it is the familiar 32/k codes per word).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zq.errors import ZqError


def packed_words(count: int, bits: int) -> int:
    """Number of 32-bit words that hold `count` codes of `bits` bits."""
    return -(-count * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes [N, K] (any integer dtype, 0 <= code < 2**bits) -> [N, ceil(K*bits/32)] int32."""
    _check(bits)
    n, k = codes.shape
    chunks = -(-k // 32)
    padded = torch.nn.functional.pad(codes, (0, chunks * 32 - k)) if k % 32 else codes
    if bits in (4, 8):
        return _pack_bytes(padded, bits)[:, : packed_words(k, bits)].contiguous()
    lanes = padded.reshape(n, chunks, 32).to(torch.int32)
    words = torch.zeros(n, chunks, bits, dtype=torch.int32, device=codes.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        words[:, :, word] |= lanes[:, :, i] << shift
        if shift + bits > 32:  # the high bits go to the next word
            words[:, :, word + 1] |= lanes[:, :, i] >> (32 - shift)
    return words.reshape(n, chunks * bits)[:, : packed_words(k, bits)].contiguous()


def unpack(words: Tensor, bits: int, k: int) -> Tensor:
    """words [N, ceil(k*bits/32)] int32 -> codes [N, k] uint8. Exact inverse of `pack`."""
    _check(bits)
    n = words.shape[0]
    if words.shape[1] != packed_words(k, bits):
        raise ZqError(
            f"packed row has {words.shape[1]} words; {k} codes of {bits} bits need "
            f"{packed_words(k, bits)}: the checkpoint disagrees with its config"
        )
    if bits in (4, 8):
        return _unpack_bytes(words, bits)[:, :k].contiguous()
    chunks = -(-k // 32)
    pad = chunks * bits - words.shape[1]
    if pad:
        words = torch.nn.functional.pad(words, (0, pad))
    words = words.reshape(n, chunks, bits)
    codes = torch.empty(n, chunks, 32, dtype=torch.uint8, device=words.device)
    for i in range(32):
        word, shift = divmod(i * bits, 32)
        value = (words[:, :, word] >> shift) & _low(min(bits, 32 - shift))
        if shift + bits > 32:
            value = value | (words[:, :, word + 1] & _low(shift + bits - 32)) << (32 - shift)
        codes[:, :, i] = value.to(torch.uint8)
    return codes.reshape(n, chunks * 32)[:, :k].contiguous()


def _pack_bytes(codes: Tensor, bits: int) -> Tensor:
    """`pack` of 4 and 8 bits, much faster; K is a multiple of 32."""
    n, k = codes.shape
    held = codes.to(torch.uint8).reshape(n * k)  # flat, as strides of single rows and columns mean nothing
    if bits == 4:
        pairs = held.view(torch.int16)
        held = (pairs >> 4).bitwise_or_(pairs).to(torch.uint8)  # the low byte: one code above the other
    return held.view(torch.int32).view(n, packed_words(k, bits))


def _unpack_bytes(words: Tensor, bits: int) -> Tensor:
    """The inverse, with what fills the last word."""
    n, count = words.shape
    held = words.reshape(n * count).view(torch.uint8)
    if bits == 4:
        pairs = held.to(torch.int16)
        held = (pairs << 4).bitwise_or_(pairs).bitwise_and_(0x0F0F).view(torch.uint8)
    return held.view(n, count * 32 // bits)


def _low(bits: int) -> int:
    """Mask of the lowest bits; it also undoes the sign extension of an arithmetic shift right."""
    return (1 << bits) - 1


def _check(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ZqError(f"cannot pack codes of {bits} bits; allowed: 1 to 8")
