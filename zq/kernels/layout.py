"""The packed weight: one layout for every tensor-core path, read with 16-byte loads and no index arithmetic.

A weight [N, K] is cut into *tiles* of 64 rows x 128 inputs; N and K are padded to 128. The two tiles of 128
rows and the same inputs lie side by side, so that one bulk copy fetches both; pairs follow along K, then
along N: tile r of step k is at ((r / 2 * steps + k) * 2 + r % 2) * tile_bytes. A tile holds its codes and,
behind them, the scales that the inner loop needs. Inside a tile codes lie in *fragment order*: thread
t = 32 w + l of 128 (warp w, lane l) finds its registers of the A operand at 16-byte chunks
(i * 128 + t) * 16, i = 0, 1, ...

    The A fragment of wgmma m64 in warp w is that of mma.sync m16 for rows 16 w .. 16 w + 15 (PTX ISA,
    fragments of wgmma.m64nNk32 and mma.m16n8k32): register p = 0 .. 3 of lane l holds row l / 4 + 8 (p & 1)
    and the four bytes from byte 4 (l % 4) + 16 (p >> 1) on, of the 32 bytes of k that an instruction takes.
    Whether an element has two bytes (16-bit activations) or one, these bytes are the same.

How a 32-bit word holds codes (k is that of the first byte or element; r the row l / 4):

    4 bits, 8-bit activations   word 2 j + h: byte b = row r (low nibble), r + 8 (high) at k = 32 j + 16 h + b
    4 bits, 16-bit activations  word f: nibbles p and p + 4 = the pair of register p of k = 16 f
    8 bits, 8-bit activations   word 4 j + p = register p of k = 32 j
    8 bits, 16-bit activations  word 2 f + v, k = 16 f: bytes 0, 2 = register 2 v; 1, 3 = register 2 v + 1

and what a 4-bit code looks like there:

    w4a8_two, w4a16   q + 8
    w4a8_group        q, two's complement: a shift makes it 16 q as INT8
    w4a8_fp8          sign and |q| - sign: bits 0-2 and 7 of a byte for row r, 4-6 and (in the next byte) 3
                      for row r + 8. A rotation, two masks and the sign added to the lowest bit give the e4m3
                      codes of q * 2^-9 for all of -8 .. 7: below 16, e4m3 is linear.

Scales, for each pair of rows (16 w + l / 4, + 8), for each group of the tile:

    w4a8_two              u8   s_r, s_r+8, o_r, o_r+8       u = q s + o, weight = channel scale * (u - 128)
    w4a8_group, w4a8_fp8  f32  s_r, s_r+8                   weight = s (q - 8)
    w4a16                 b16  s_r, s_r+8 [, z_r, z_r+8]    weight = s (q - z), z as 128 + z (fp16: 1024 + z)
    fp8_block             f32  s, 0, 0, 0 for the whole tile
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.numerics.qtensor import QTensor

ROWS, STEP = 64, 128  # of a tile
PAD = 128  # N and K are padded to it
KINDS = ("w8a8", "fp8_block", "w4a8_two", "w4a8_group", "w4a8_fp8", "w4a16", "w8a16")
GROUPS = {"w4a8_two": (64, 128), "w4a8_group": (0, 32, 64, 128), "w4a8_fp8": (32, 64, 128)}
GROUPS["w4a16"] = (0, 32, 64, 128)


@dataclass(frozen=True)
class Packing:
    """What a packed weight holds. group: inputs that share a scale in the loop, 0 = scales outside (per
    channel). asym: zero points (w4a16). half: 16-bit scales are fp16, not bf16 (w4a16).

    Raises ZqError for a combination that no kernel computes.
    """

    kind: str
    group: int = 0
    asym: bool = False
    half: bool = False

    def __post_init__(self) -> None:
        groups = GROUPS.get(self.kind, (0,))
        if self.kind not in KINDS or self.group not in groups or (self.asym and not self.zeros):
            raise ZqError(
                f"no kernel computes packing '{self.kind}' with group {self.group}"
                f"{' and zero points' if self.asym else ''}; allowed: {', '.join(KINDS)}, groups of 32 (not "
                "two-level), 64 or 128, zero points with w4a16 in groups; dequantize the layer instead"
            )

    @property
    def zeros(self) -> bool:
        return self.kind == "w4a16" and self.group > 0

    @property
    def bits(self) -> int:
        return 4 if self.kind.startswith("w4") else 8

    @property
    def act_bytes(self) -> int:
        return 2 if self.kind.endswith("a16") else 1

    @property
    def float16(self) -> torch.dtype:
        return torch.float16 if self.half else torch.bfloat16

    @property
    def scale_bytes(self) -> int:
        """Of one tile."""
        if self.kind == "fp8_block":
            return 16
        per_pair = {"w4a8_two": 4, "w4a8_group": 8, "w4a8_fp8": 8, "w4a16": 8 if self.asym else 4}
        return ROWS // 2 * (STEP // self.group) * per_pair[self.kind] if self.group else 0

    @property
    def tile_bytes(self) -> int:
        return ROWS * STEP * self.bits // 8 + self.scale_bytes


def padded(size: int) -> int:
    return -(-size // PAD) * PAD


def packed_bytes(p: Packing, n: int, k: int) -> int:
    return padded(n) // ROWS * (padded(k) // STEP) * p.tile_bytes


def pack(p: Packing, codes: Tensor, scale: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """codes uint8 [N, K] -> uint8 [packed_bytes], on the device of the codes.

    codes: 4 bits as q + 8 (0 .. 15), 8 bits as the raw byte. scale, offset: [N, G] as the module says (uint8
    s and o; f32; any float; offset of w4a16 is z in 0 .. 15); fp8_block: f32 [ceil(N/128), ceil(K/128)].
    Padding holds codes of zero and scales of one.
    """
    n, k = codes.shape
    tiles = _to_tiles(codes, 8 if p.bits == 4 else 0)
    slots = tiles[..., _order(p.bits, p.act_bytes).to(codes.device)]
    data = slots if p.bits == 8 else _join(p, slots)
    parts = [data]
    if p.kind == "fp8_block":
        assert scale is not None
        rows = scale.float().repeat_interleave(2, 0)[:, :, None]
        parts.append(_bytes(torch.nn.functional.pad(rows, (0, 3))))
    elif p.group:
        assert scale is not None
        parts.append(_bytes(_scale_block(p, scale, offset, n, k)))
    return torch.cat(parts, -1).unflatten(0, (-1, 2)).transpose(1, 2).reshape(-1)


def unpack(p: Packing, packed: Tensor, n: int, k: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Inverse of `pack`: (codes, scale, offset) without the padding."""
    up, kp = padded(n) // ROWS, padded(k) // STEP
    tiles = packed.reshape(up // 2, kp, 2, p.tile_bytes).transpose(1, 2).reshape(up, kp, p.tile_bytes)
    data, block = tiles.split([p.tile_bytes - p.scale_bytes, p.scale_bytes], -1)
    slots = data if p.bits == 8 else _separate(p, data)
    codes = slots[..., torch.argsort(_order(p.bits, p.act_bytes)).to(packed.device)]
    codes = codes.reshape(up, kp, ROWS, STEP).transpose(1, 2).reshape(up * ROWS, kp * STEP)[:n, :k]
    scale = offset = None
    if p.kind == "fp8_block":
        scale = block.contiguous().view(torch.float32)[::2, :, 0][: -(-n // 128), : -(-k // 128)]
    elif p.group:
        scale, offset = _from_scale_block(p, block.contiguous(), n, k)
    return codes.contiguous(), scale, offset


def two_level(q: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric 4-bit two-level QTensor -> (codes [N, K], s [N, G], o [N, G]), uint8, code * s + o =
    128 + q * sub in 0 .. 255. A group with a negative sub has its codes mirrored, so that s > 0."""
    assert q.sub is not None
    assert q.spec.layout.size
    sub = q.sub.short()
    mirrored = (sub < 0).repeat_interleave(q.spec.layout.size, 1)[:, : q.shape[1]]
    codes = q.codes.short() + 8
    codes = torch.where(mirrored, 15 - codes, codes)
    offset = 128 - torch.where(sub < 0, 7, 8) * sub.abs()
    return codes.to(torch.uint8), sub.abs().to(torch.uint8), offset.to(torch.uint8)


@lru_cache
def _order(bits: int, act_bytes: int) -> Tensor:
    """[8192] int64: the place in a row-major 64 x 128 tile of the element in each slot (nibble or byte) of
    the packed tile, slots counted from the lowest bit of the lowest address."""
    per_word = 32 // bits
    chunks = ROWS * STEP // (128 * 4 * per_word)
    chunk, t, word, slot = torch.meshgrid(
        torch.arange(chunks), torch.arange(128), torch.arange(4), torch.arange(per_word), indexing="ij"
    )
    word = 4 * chunk + word
    row, column = t // 32 * 16 + t % 32 // 4, t % 4
    if (bits, act_bytes) == (4, 1):
        row, k = row + 8 * (slot % 2), 16 * word + 4 * column + slot // 2
    elif (bits, act_bytes) == (4, 2):
        p = slot % 4
        row, k = row + 8 * (p % 2), 16 * word + 8 * (p // 2) + 2 * column + slot // 4
    elif (bits, act_bytes) == (8, 1):
        p = word % 4
        row, k = row + 8 * (p % 2), 32 * (word // 4) + 16 * (p // 2) + 4 * column + slot
    else:
        row, k = row + 8 * (slot % 2), 16 * (word // 2) + 8 * (word % 2) + 2 * column + slot // 2
    return (row * STEP + k).reshape(-1)


def _to_tiles(codes: Tensor, fill: int) -> Tensor:
    n, k = codes.shape
    full = torch.nn.functional.pad(codes, (0, padded(k) - k, 0, padded(n) - n), value=fill)
    return full.reshape(-1, ROWS, full.shape[1] // STEP, STEP).transpose(1, 2).flatten(2)


def _join(p: Packing, codes: Tensor) -> Tensor:
    """Slots [..., 2 b] and [..., 2 b + 1] (codes q + 8) -> bytes."""
    low, high = codes[..., ::2], codes[..., 1::2]
    if p.kind == "w4a8_group":
        low, high = low ^ 8, high ^ 8
    if p.kind != "w4a8_fp8":
        return low | high << 4
    (low, low_sign), (high, high_sign) = _magnitude(low), _magnitude(high)
    next_sign = high_sign.unflatten(-1, (-1, 4)).roll(1, -1).flatten(-2)
    return low | next_sign << 3 | high << 4 | low_sign << 7


def _separate(p: Packing, data: Tensor) -> Tensor:
    low, high = data & 15, data >> 4
    if p.kind == "w4a8_group":
        low, high = low ^ 8, high ^ 8
    if p.kind == "w4a8_fp8":
        high_sign = (data >> 3 & 1).unflatten(-1, (-1, 4)).roll(-1, -1).flatten(-2)
        low, high = _code(data & 7, data >> 7), _code(data >> 4 & 7, high_sign)
    return torch.stack((low, high), -1).flatten(-2)


def _magnitude(code: Tensor) -> tuple[Tensor, Tensor]:
    """q + 8 -> (|q| - sign, sign)."""
    sign = (code < 8).to(torch.uint8)
    return torch.where(code < 8, 7 - code, code - 8), sign


def _code(magnitude: Tensor, sign: Tensor) -> Tensor:
    return torch.where(sign > 0, 7 - magnitude, 8 + magnitude)


def _pairs(x: Tensor, n: int, k: int, group: int) -> Tensor:
    """[N, G] -> [tiles along N, tiles along K, 32 pairs of rows, groups of a tile, 2]."""
    groups = STEP // group
    full = torch.nn.functional.pad(x, (0, padded(k) // group - x.shape[1], 0, padded(n) - n), value=1)
    cut = full.reshape(-1, 4, 2, 8, padded(k) // STEP, groups)  # tile, warp, half, lane / 4, step, group
    return cut.permute(0, 4, 1, 3, 5, 2).flatten(2, 3)


def _unpairs(x: Tensor, n: int, k: int, group: int) -> Tensor:
    up, kp, _, groups, _ = x.shape
    rows = x.unflatten(2, (4, 8)).permute(0, 2, 5, 3, 1, 4)
    return rows.reshape(up * ROWS, kp * groups)[:n, : -(-k // group)].contiguous()


def _scale_block(p: Packing, scale: Tensor, offset: Tensor | None, n: int, k: int) -> Tensor:
    if p.kind in ("w4a8_group", "w4a8_fp8"):
        return _pairs(scale.float(), n, k, p.group)
    scale = _pairs(scale if p.kind == "w4a8_two" else scale.to(p.float16), n, k, p.group)
    if offset is None:
        return scale
    if p.kind == "w4a16":
        offset = (offset.float() + (1024 if p.half else 128)).to(p.float16)
    return torch.cat((scale, _pairs(offset, n, k, p.group)), -1)


def _from_scale_block(p: Packing, block: Tensor, n: int, k: int) -> tuple[Tensor, Tensor | None]:
    shape = (*block.shape[:2], ROWS // 2, STEP // p.group, -1)
    if p.kind in ("w4a8_group", "w4a8_fp8"):
        return _unpairs(block.view(torch.float32).reshape(shape), n, k, p.group), None
    values = (block if p.kind == "w4a8_two" else block.view(p.float16)).reshape(shape)
    scale = _unpairs(values[..., :2], n, k, p.group)
    if values.shape[-1] == 2:
        return scale, None
    offset = _unpairs(values[..., 2:], n, k, p.group)
    return scale, (
        (offset.float() - (1024 if p.half else 128)).to(torch.uint8) if p.kind == "w4a16" else offset
    )


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().flatten(2).view(torch.uint8)
