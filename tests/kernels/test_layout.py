"""The packed weight: `unpack` undoes `pack`; the kernels' code puts every value into the right register."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.fragments import COMPILER, build, gather_a, swizzled
from zq.errors import ZqError
from zq.kernels.layout import GROUPS, KINDS, Packing, pack, packed_bytes, two_level, unpack
from zq.kernels.table_gemm import macros
from zq.numerics.qtensor import QTensor, quantize
from zq.spec import TensorSpec

PACKINGS = [Packing(kind, group) for kind in KINDS for group in GROUPS.get(kind, (0,))]
PACKINGS += [
    Packing("w4a16", g, asym, half) for g in (32, 128) for asym in (False, True) for half in (False, True)
]
PACKINGS = list(dict.fromkeys(PACKINGS))
OPS = {
    "w4a8_two": "w4a8_int8",
    "w4a8_group": "w4a8_int8_group",
    "fp8_block": "fp8_block128",
    "w8a8": "w8a8_int8",
}


def example(p: Packing, n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=g, dtype=torch.uint8)

    codes = integers(0, 16 if p.bits == 4 else 256, n, k)
    groups = -(-k // p.group) if p.group else 0
    if p.kind == "fp8_block":
        return codes, torch.rand(-(-n // 128), -(-k // 128), generator=g), None
    if p.kind == "w4a8_two":
        s = integers(1, 17, n, groups)
        return codes, s, (integers(0, 256, n, groups).int() * (255 - 15 * s.int()) // 255).to(torch.uint8)
    if not p.group:
        return codes, None, None
    scale = torch.rand(n, groups, generator=g) + 0.5
    scale = scale.to(p.float16) if p.kind == "w4a16" else scale
    return codes, scale, integers(0, 16, n, groups) if p.asym else None


def name(p: Packing) -> str:
    return f"{p.kind}-g{p.group}" + "-asym" * p.asym + "-fp16" * p.half


@pytest.mark.parametrize("p", PACKINGS, ids=name)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (70, 200), (256, 384), (129, 128)])
def test_unpack_undoes_pack(p: Packing, n: int, k: int) -> None:
    given = example(p, n, k)
    packed = pack(p, *given)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_bytes(p, n, k)
    for was, now in zip(given, unpack(p, packed, n, k), strict=True):
        assert (was is None) == (now is None)
        assert was is None or (was.dtype == now.dtype and torch.equal(was, now))


@pytest.mark.parametrize("p", PACKINGS, ids=name)
def test_the_two_tiles_of_128_rows_and_a_step_lie_side_by_side(p: Packing) -> None:
    n, k = 384, 512
    given = example(p, n, k)
    packed, steps = pack(p, *given), k // 128
    for row, step in [(0, 0), (1, 3), (4, 0), (5, 2)]:
        here = (row // 2 * steps + step) * 2 + row % 2
        found = packed[here * p.tile_bytes :][: p.tile_bytes]
        one = [None if x is None else cut(x, row, step, steps) for x in given]
        assert torch.equal(found, pack(p, *one)[: p.tile_bytes])  # type: ignore[arg-type]


def cut(x: Tensor, row: int, step: int, steps: int) -> Tensor:
    """The part of codes, scales or offsets that belongs to a tile, the tile's rows first."""
    width = x.shape[1] // steps
    here = x[:, step * width : (step + 1) * width]
    if x.shape[0] == 3:  # blocks of 128 rows
        return here[row // 2 :][:1]
    return here[64 * row :][:64]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("p", PACKINGS, ids=name)
def test_the_kernels_registers_hold_the_weight(p: Packing, tmp_path: Path) -> None:
    """`load` and `convert` of zq/kernels/src/scheme.cuh, compiled for the host, on each of four tiles."""
    library = build(tmp_path, (*macros(OPS.get(p.kind, p.kind), p), ("HALF_WIDTH", 1), ("TOKENS", 8)))
    assert library.tile_bytes() == p.tile_bytes
    n, k = 128, 256
    codes, scale, offset = example(p, n, k)
    packed = pack(p, codes, scale, offset).reshape(2, 2, -1).numpy()  # steps, the two tiles of a pair
    wanted = expected(p, codes, scale, offset)
    for row in range(2):
        for step in range(2):
            registers = np.zeros((p.act_bytes, 128, 16), np.uint32)
            scales = np.zeros((128, library.scales()), np.float32)
            tile = np.ascontiguousarray(packed[step, row])
            library.registers(*(a.ctypes.data_as(ctypes.c_void_p) for a in (tile, registers, scales)))
            here = wanted[64 * row :, 128 * step :][:64, :128]
            assert np.array_equal(gather_a(registers, p.act_bytes), here)
            if p.kind in ("w4a8_group", "w4a8_fp8") and scale is not None:
                check_scales(scales, scale[64 * row :][:64].numpy(), step, p)


def expected(p: Packing, codes: Tensor, scale: Tensor | None, offset: Tensor | None) -> np.ndarray:
    """The raw elements of A [N, K] that the tensor core should see."""

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(p.group, 1)

    q = codes.int() - 8
    if p.kind in ("w8a8", "fp8_block"):
        return codes.numpy()
    if p.kind == "w4a8_two":
        return (codes.int() * spread(scale.int()) + spread(offset.int())).to(torch.uint8).numpy()
    if p.kind == "w4a8_group":
        return (16 * q).to(torch.int8).view(torch.uint8).numpy()
    if p.kind == "w4a8_fp8":
        return (q * 2.0**-9).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    value = codes.view(torch.int8).float() if p.kind == "w8a16" else q.float()
    if offset is not None:
        value = codes.float() - spread(offset.float())
    if scale is not None:
        value = value * spread(scale.float())
    found = value.to(p.float16)
    return torch.where(found == 0, 0, found).view(torch.uint16).numpy()


def check_scales(found: np.ndarray, scale: np.ndarray, step: int, p: Packing) -> None:
    """Each thread has the scales of rows l / 4 and l / 4 + 8 of its warp, times the unit of the codes."""
    unit = 512 if p.kind == "w4a8_fp8" else 1 / 16
    groups = 128 // p.group
    here = scale[:, step * groups : (step + 1) * groups] * unit
    for t in range(128):
        row = t // 32 * 16 + t % 32 // 4
        assert np.array_equal(found[t].reshape(groups, 2), np.stack((here[row], here[row + 8]), -1))


def test_every_code_of_w4a8_fp8_is_exact() -> None:
    """Below 16 the bit pattern of e4m3 is linear, also where it turns from subnormal to normal."""
    codes = torch.arange(17, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(codes, torch.arange(17) * 2.0**-9)


@pytest.mark.parametrize("scale", ["absmax", "mse", "mse-signed"])
def test_two_level_gives_the_products(scale: str) -> None:
    w = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    q = quantize(w, TensorSpec.parse("int4:g64:two-level"), scale=scale)
    codes, s, o = two_level(q)
    assert int(codes.max()) <= 15
    assert int(s.min()) >= 1
    spread = [x.int().repeat_interleave(64, 1) for x in (s, o)]
    u = codes.int() * spread[0] + spread[1]
    assert int(u.min()) >= 0
    assert int(u.max()) <= 255
    assert torch.equal(u - 128, q.codes.int() * q.sub.int().repeat_interleave(64, 1))


def test_two_level_with_every_sub() -> None:
    subs = torch.tensor([s for s in range(-15, 17) if s], dtype=torch.int8)[:, None]
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(len(subs), 4)
    spec = TensorSpec.parse("int4:g64:two-level")
    q = QTensor(codes, torch.ones(len(subs), 1), None, subs, spec)
    unsigned, s, o = two_level(q)
    assert torch.equal(unsigned.int() * s.int() + o.int() - 128, codes.int() * subs.int())


@pytest.mark.parametrize(
    "bad", [("w4a8", 0, False), ("w4a8_two", 32, False), ("w8a8", 128, False), ("w4a16", 0, True)]
)
def test_unknown_packings_are_refused(bad: tuple[str, int, bool]) -> None:
    with pytest.raises(ZqError, match="no kernel computes"):
        Packing(*bad)


def test_activations_where_the_tensor_core_reads_them() -> None:
    """Sixteen-byte chunk c of token t is stored at chunk c ^ (t % 8): as a 128-byte swizzle, in ZQ_PLAIN of
    gemm_sm90.cu and in gemm_mma.cu; read by descriptors that advance by 32 bytes, and by ldmatrix."""
    token, byte = np.meshgrid(np.arange(256), np.arange(128), indexing="ij")
    stored = token * 128 + (byte // 16 ^ token % 8) * 16 + byte % 16
    assert np.array_equal(stored, swizzled(token, byte))
    memory = np.zeros(256 * 128, np.int64)
    memory[stored] = token * 128 + byte

    for j in range(4):  # wgmma: start address + 32 j, rows of 128 bytes, eight rows 1024 bytes further
        row, within = np.meshgrid(np.arange(256), np.arange(32), indexing="ij")
        address = row // 8 * 1024 + row % 8 * 128 + 32 * j + within
        address ^= (address >> 7 & 7) << 4  # on the address: tiles begin at multiples of 1024
        assert np.array_equal(memory[address], row * 128 + 32 * j + within)

    for j in range(
        4
    ):  # mma.sync: lane l gives row l % 8 of matrix l / 8; it receives row l / 4, bytes 4 (l % 4) ..
        for block in range(0, 32, 2):
            lane = np.arange(32)
            row = block * 8 + (lane & 7) + (lane >> 4) * 8
            address = row * 128 + ((2 * j + (lane >> 3 & 1)) ^ (row & 7)) * 16
            for matrix in range(4):
                got = memory[
                    address[matrix * 8 + lane // 4][:, None] + 4 * (lane % 4)[:, None] + np.arange(4)
                ]
                n = block * 8 + matrix // 2 * 8 + lane // 4  # b0, b1 of block, b0, b1 of block + 1
                k = 32 * j + 16 * (matrix % 2) + 4 * (lane % 4)
                assert np.array_equal(got, n[:, None] * 128 + k[:, None] + np.arange(4))


@pytest.mark.parametrize("tokens", [8, 16, 32, 64])
def test_the_sums_come_out_transposed(tokens: int) -> None:
    """Registers of D, through stmatrix.trans with a pitch of 144 bytes, to rows of y (gemm_sm90.cu)."""
    t = np.arange(128)
    warp, lane = t // 32, t % 32
    memory = np.full(tokens * 72, -1)
    for j in range(tokens // 8):
        for i in range(4):  # D: row 16 w + l / 4 + 8 (i / 2), token 8 j + 2 (l % 4) + i % 2
            row, token = 16 * warp + lane // 4 + 8 * (i // 2), 8 * j + 2 * (lane % 4) + i % 2
            value = row * 1000 + token
            # The thread's half i % 2 of register i / 2 is element [l / 4][2 (l % 4) + i % 2] of matrix i / 2;
            # transposed, to element l / 4 of the row that lane 8 (i / 2) + 2 (l % 4) + i % 2 points to.
            source = 8 * (i // 2) + 2 * (lane % 4) + i % 2
            address = (j * 8 + source % 8) * 144 + (warp * 16 + source // 8 % 2 * 8) * 2
            memory[address // 2 + lane // 4] = value
    c = np.arange(tokens * 8)
    for e in range(8):
        token, n = c // 8, c % 8 * 8 + e
        assert np.array_equal(memory[token * 72 + c % 8 * 8 + e], n * 1000 + token)


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("tokens", [8, 128, 256])
def test_every_tile_of_y_is_computed_once(tokens: int, tmp_path: Path) -> None:
    library = build(tmp_path, (*macros("w8a8_int8", Packing("w8a8")), ("HALF_WIDTH", 1), ("TOKENS", tokens)))
    for tiles_m, groups_n in ((1, 1), (1, 7), (33, 5), (100, 3), (7, 64)):
        found = np.zeros((tiles_m * groups_n, 2), np.int32)
        library.tiles(tiles_m, groups_n, found.ctypes.data_as(ctypes.c_void_p))
        assert {(m, n) for m, n in found.tolist()} == {
            (m, n) for m in range(tiles_m) for n in range(groups_n)
        }
