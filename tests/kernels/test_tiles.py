"""What is launched: every shape has a launch that fits the device and covers all of y and all of K."""

from __future__ import annotations

import pytest

from zq.errors import ZqError
from zq.kernels import tiles
from zq.kernels.table_gemm import GEMM_UNITS
from zq.kernels.tiles import Config, Tile, choose, packing

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of a block
SHAPES = [(n, k) for n in (16, 128, 1000, 6144, 28672) for k in (16, 128, 4096, 28672)]
TOKENS = (1, 7, 8, 9, 33, 64, 65, 128, 200, 256, 1024, 4096, 100_000)
UNITS = {unit.name: unit for unit in GEMM_UNITS}


def schemes() -> list[tuple[str, int, bool, bool]]:
    defines = [(unit.ops[0], dict(unit.defines)) for unit in GEMM_UNITS if unit.name.startswith("sm90")]
    return [(op, int(d["ZQ_GROUP"]), d["ZQ_ASYM"] == "1", d["ZQ_HALF"] == "1") for op, d in defines]


def tile_of(c: Config, op: str, group: int, arch: int) -> Tile:
    return next(t for t in tiles.tiles(op, packing(op, group), arch) if t.entry == c.entry)


@pytest.mark.parametrize("arch", list(SHARED))
@pytest.mark.parametrize(("op", "group", "asym", "half"), schemes())
def test_every_shape_has_a_launch(op: str, group: int, asym: bool, half: bool, arch: int) -> None:
    if "fp8" in op and arch < 89:
        pytest.skip("refused, see below")
    for n, k in SHAPES:
        for m in TOKENS:
            c = choose(op, m, n, k, group=group, arch=arch, sms=132, asym=asym, half=half)
            unit, tile = UNITS[c.unit], tile_of(c, op, group, arch)
            assert c.entry in unit.entries
            assert c.shared <= SHARED[arch] * 1024
            assert c.block * c.grid[0] > 0
            assert c.grid[0] < 2**31
            blocks = -(-m // tile.tokens) * -(-n // tile.rows)
            if arch == 90:
                assert c.grid[0] % c.cluster == 0
                assert c.cluster in (1, 2, 4, 8)
                assert c.split in (0, 1, c.cluster)
                assert c.split <= 1 or (c.grid[0] == blocks * c.split and tile.tokens <= 64)
                assert c.map_rows % 8 == 0  # a slice of x is made of whole groups of the swizzle
                assert c.map_rows * c.cluster == tile.tokens * max(c.split, 1)
                assert c.zeroed >= 8 * c.grid[0] * (c.split == 0)
                assert c.zeroed % 16 == 0
                assert c.workspace - c.zeroed == (
                    c.grid[0] * tile.rows * tile.tokens * 4 if c.split == 0 else 0
                )
                assert c.split or (c.cluster == 1 and c.grid[0] <= 132 * tiles.resident(tile))  # all at once
                assert (c.shared + 1024) * tiles.resident(tile) <= 228 * 1024
                assert tiles.resident(tile) * c.block <= 1024
            else:
                assert c.grid == (blocks, 1, c.split)
                assert c.zeroed >= 4 * blocks * (c.split > 1)
                assert c.zeroed % 16 == 0
                assert c.workspace - c.zeroed == (
                    blocks * c.split * 128 * tile.tokens * 4 if c.split > 1 else 0
                )
                assert c.shared >= tile.tokens * (2 * 128 + 16)  # y is transposed there
            assert c.split <= -(-k // 128)


def test_the_ring_has_room_to_hide_latency() -> None:
    for op, group, asym, half in schemes():
        p = packing(op, group, asym, half)
        for tile in tiles.tiles(op, p, 90):
            stages, _ = tiles.stages_and_shared(op, p, tile)
            assert stages >= (3 if tile.rows == 256 and p.act_bytes == 2 else 4)  # those take longest
            if tiles.turns(op, p, tile) == 2:  # else a stage would change hands, or be waited for for ever
                assert stages % 2 == 0
                assert stages >= 6


MEASURED = {  # microseconds of w4a8_int8 g128 on an H200, by (M, N, K): entry/cluster/split
    (1, 28672, 8192): {"t8/1/1": 32.5},
    (16, 28672, 8192): {"t16/1/1": 32.3, "t32/1/1": 38.8, "t64/1/1": 51.3},
    (64, 28672, 8192): {"t64/1/1": 43.4, "t64/2/1": 45.2, "t128x2/1/1": 47.4, "t32/1/1": 72.5},
    (256, 28672, 8192): {"t256/1/1": 99.7, "t256/2/1": 100.1, "t128x2/1/1": 114.2, "t128/1/1": 123.9},
    (1024, 28672, 8192): {"t256/1/1": 339.4, "t256/2/1": 357.4, "t128x2/1/1": 392.5, "t128/1/1": 428},
    (4096, 28672, 8192): {"t256/1/1": 1369, "t256/2/1": 1484, "t128x2/1/1": 1569, "t128/1/1": 1684},
    (1, 6144, 4096): {"t8/4/4": 8.2, "t8/2/2": 8.4, "t8/1/1": 10.2},
    (16, 6144, 4096): {"t16/4/4": 8.4, "t16/2/2": 8.4, "t16/1/1": 10.5},
    (64, 6144, 4096): {"t64/2/2": 11.1, "t32/1/1": 11.5, "t64/1/1": 12.1},
    (256, 6144, 4096): {"t128/1/1": 19.7, "t128/2/1": 20.3, "t64/1/1": 27.3, "t256/1/1": 31.0},
    (1024, 6144, 4096): {"t128/2/1": 55.0, "t128/1/1": 55.4, "t256/1/1": 60.6, "t128x2/2/1": 65.9},
    (4096, 6144, 4096): {"t256/1/1": 176.4, "t256/2/1": 178.7, "t128x2/2/1": 195},
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_what_is_chosen_was_the_fastest_or_almost(shape: tuple[int, int, int]) -> None:
    c = choose("w4a8_int8", *shape, group=128, arch=90, sms=132)
    times = MEASURED[shape]
    way = f"{c.entry}/{c.cluster}/{max(c.split, 1)}"  # no even share has been measured
    assert times[way] <= 1.02 * min(times.values())


def test_tiles_that_do_not_fill_a_round_are_shared_evenly() -> None:
    def split(m: int, n: int) -> int:
        return choose("w4a8_int8", m, n, 8192, group=128, arch=90, sms=132).split

    assert split(256, 28672) == 0  # 224 tiles
    assert split(1, 28672) == 1  # two blocks on a multiprocessor: those that are alone are faster
    assert split(256, 2 * 132 * 128) == 1  # two rounds
    assert split(1, 4096) > 1  # adding up the sums of many blocks takes longer than a cluster does


def test_few_tokens_take_a_tile_of_their_size() -> None:
    entries = [
        choose("w4a8_int8", m, 4096, 4096, group=128, arch=90, sms=132).entry for m in (1, 8, 9, 17, 33)
    ]
    assert entries == ["t8", "t8", "t16", "t32", "t64"]


def test_few_rows_split_k_until_the_device_is_full() -> None:
    assert choose("w4a8_int8", 1, 4096, 4096, group=128, arch=90, sms=132).grid[0] == 256
    assert choose("w4a8_int8", 1, 28672, 8192, group=128, arch=90, sms=132).split <= 1


def test_every_unit_is_of_use() -> None:
    """No entry is compiled that nothing launches."""
    launched = {
        (c.unit, c.entry)
        for op, group, asym, half in schemes()
        for arch in (89, 90)
        for n, k in SHAPES
        for m in (*TOKENS, 12, 20, 96, 300, 500, 2000)
        for c in [choose(op, m, n, k, group=group, arch=arch, sms=132, asym=asym, half=half)]
    }
    assert launched == {(unit.name, entry) for unit in GEMM_UNITS for entry in unit.entries}


@pytest.mark.parametrize("op", ["w8a8_fp8", "fp8_block128", "w4a8_fp8"])
@pytest.mark.parametrize("arch", [80, 86])
def test_fp8_needs_sm_89(op: str, arch: int) -> None:
    with pytest.raises(ZqError, match="needs FP8 tensor cores"):
        choose(op, 1, 128, 128, group=128 if op == "w4a8_fp8" else 0, arch=arch, sms=108)


@pytest.mark.parametrize("op", ["w8a8_int8", "w4a8_int8", "w4a8_int8_group"])
def test_int32_sums_have_an_end(op: str) -> None:
    group = 128 if op == "w4a8_int8" else 0
    assert choose(op, 1, 128, 65536, group=group, arch=90, sms=132)
    with pytest.raises(ZqError, match="INT32"):
        choose(op, 1, 128, 65552, group=group, arch=90, sms=132)
