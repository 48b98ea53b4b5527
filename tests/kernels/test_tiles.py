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
                assert 1 <= c.cluster <= 8
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


MEASURED = {  # microseconds on an H200, the five fastest ways by (operator, M, N, K): entry/split
    ("w4a8_int8", 1, 4096, 4096): {"t8/5": 7.0, "t8/2": 7.1, "t8/0": 7.2, "t8/4": 7.3, "t8/6": 7.3},
    ("w4a8_int8", 16, 4096, 14336): {
        "t16/6": 14.1,
        "t16/7": 14.3,
        "t16/5": 14.7,
        "t16/0": 14.9,
        "t32/0": 15.6,
    },
    ("w4a8_int8", 32, 4096, 14336): {
        "t32/0": 15.7,
        "t32/3": 16.0,
        "t64/3": 18.4,
        "t64/0": 18.5,
        "t32/2": 18.5,
    },
    ("w4a8_int8", 64, 4096, 14336): {
        "t64/0": 18.0,
        "t64/3": 18.3,
        "t32/0": 21.2,
        "t64/2": 21.2,
        "t32/2": 21.7,
    },
    ("w4a8_int8", 128, 6144, 4096): {
        "t64/1": 13.3,
        "t128/0": 13.9,
        "t64/0": 14.7,
        "t128/1": 14.8,
        "t32/0": 18.6,
    },
    ("w4a8_int8", 512, 6144, 4096): {
        "t256/1": 24.2,
        "t128x2/1": 25.9,
        "t256/0": 26.8,
        "t128/0": 26.9,
        "t128x2/0": 27.9,
    },
    ("w4a8_int8", 16, 28672, 4096): {
        "t16/1": 17.2,
        "t16/0": 20.7,
        "t32/0": 22.1,
        "t32/1": 22.1,
        "t16/2": 25.3,
    },
    ("w8a8_int8", 128, 768, 3072): {"t32/2": 6.3, "t64/3": 6.8, "t32/3": 6.9, "t64/4": 7.0, "t16/2": 7.0},
    ("w8a8_int8", 1024, 1024, 1024): {
        "t128/1": 6.0,
        "t64/1": 7.9,
        "t128x2/1": 9.1,
        "t256/1": 9.3,
        "t64/0": 9.7,
    },
    ("w8a8_int8", 256, 3072, 1024): {"t128/1": 5.8, "t64/1": 6.5, "t32/1": 8.0, "t256/1": 9.1, "t64/0": 9.1},
    ("w8a8_int8", 4096, 1024, 4096): {
        "t256/1": 25.1,
        "t128x2/1": 28.4,
        "t256/0": 31.9,
        "t128x2/0": 32.4,
        "t128/1": 33.0,
    },
    ("w8a8_int8", 1024, 28672, 8192): {
        "t256/1": 366.3,
        "t256/0": 367.6,
        "t128x2/0": 381.3,
        "t128x2/1": 389.6,
        "t128/1": 401.3,
    },
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_what_is_chosen_was_the_fastest_or_almost(case: tuple[str, int, int, int]) -> None:
    op, *shape = case
    c = choose(op, *shape, group=128 if op == "w4a8_int8" else 0, arch=90, sms=132)
    times = MEASURED[case]
    assert times[f"{c.entry}/{c.split}"] <= 1.06 * min(times.values())


def test_tiles_that_do_not_fill_a_round_are_shared_evenly() -> None:
    def split(m: int, n: int) -> int:
        return choose("w4a8_int8", m, n, 8192, group=128, arch=90, sms=132).split

    assert split(256, 28672) == 0  # 224 tiles
    assert split(1, 28672) == 1  # two blocks on a multiprocessor: those that are alone are faster
    assert split(256, 2 * 132 * 128) == 1  # two rounds
    assert split(1, 4096) > 1  # adding up the sums of many blocks takes longer than a cluster does


@pytest.mark.parametrize("m", [1, 16, 32, 64])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (4096, 14336), (5120, 5120), (1024, 8192), (8192, 28672)])
def test_clusters_fit_at_once(m: int, n: int, k: int) -> None:
    """What runs at once of clusters of a size, on an H200, by how many blocks a multiprocessor holds."""
    together = {
        2: {2: 264, 3: 237, 4: 248, 5: 235, 6: 234, 7: 224, 8: 240},
        1: {2: 132, 3: 117, 4: 120, 5: 110, 6: 102},
    }
    c = choose("w4a8_int8", m, n, k, group=128, arch=90, sms=132)
    if c.split > 1:
        assert c.grid[0] <= together[tiles.resident(tile_of(c, "w4a8_int8", 128, 90))][c.split]


def test_few_tokens_take_a_tile_of_their_size() -> None:
    entries = [
        choose("w4a8_int8", m, 4096, 4096, group=128, arch=90, sms=132).entry for m in (1, 8, 9, 17, 33)
    ]
    assert entries == ["t8", "t8", "t16", "t32", "t64"]


def test_few_rows_split_k_until_the_device_is_full() -> None:
    assert choose("w4a8_int8", 1, 4096, 14336, group=128, arch=90, sms=132).grid[0] == 192
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
