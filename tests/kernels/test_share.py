"""How blocks of gemm_sm90.cu share tiles evenly (share90.cuh, compiled for this machine): every step of every
tile once, equal shares, at most one unfinished tile a block, and nobody waits for who comes later."""

from __future__ import annotations

import ctypes

import pytest

from tests.kernels.fragments import COMPILER, build
from zq.kernels.layout import Packing
from zq.kernels.table_gemm import macros

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
PIECES = """
extern "C" int segments(int works, int steps, int blocks, int place, int evenly, int* out) {
  const Share share(works, steps, blocks, place, 0, steps, evenly);
  for (int i = 0; i < share.count; ++i) {
    const Segment segment = share[i];
    *out++ = segment.work, *out++ = segment.first, *out++ = segment.last;
    *out++ = segment.first ? share.beginner(segment.work) : place;
  }
  return share.count;
}
"""
SHAPES = [  # tiles, steps, blocks
    (224, 64, 132),
    (48, 32, 132),
    (3, 5, 4),
    (7, 1, 5),
    (8, 9, 4),
    (1, 132, 132),
    (133, 3, 132),
    (3584, 64, 132),
    (66, 4, 66),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    more = (*macros("w8a8_int8", Packing("w8a8")), ("HALF_WIDTH", 1))
    return build(tmp_path_factory.mktemp("share"), more, "share90.cuh", PIECES)


def segments(
    library: ctypes.CDLL, works: int, steps: int, blocks: int, place: int, evenly: bool = True
) -> list[tuple[int, ...]]:
    """(tile, first step, last, block that began the tile) of all that a block does, in order."""
    found = (ctypes.c_int * (4 * (works + 2)))()
    count = library.segments(works, steps, blocks, place, int(evenly), found)
    return [tuple(found[4 * i : 4 * i + 4]) for i in range(count)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_step_of_every_tile_is_done_once(library: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    works, steps, blocks = shape
    for evenly in (True, False):
        parts = [s for b in range(blocks) for s in segments(library, works, steps, blocks, b, evenly)]
        covered = sorted((tile, first, last) for tile, first, last, _ in parts)
        expected = {tile: 0 for tile in range(works)}
        for tile, first, last in covered:
            assert expected[tile] == first < last
            expected[tile] = last
        assert set(expected.values()) == {steps}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_whole_rounds_come_first(library: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    works, steps, blocks = shape
    rounds = max(works // blocks - 1, 0)
    for b in range(blocks):
        whole = [(b + i * blocks, 0, steps) for i in range(rounds)]
        assert [s[:3] for s in segments(library, works, steps, blocks, b)[:rounds]] == whole


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shares_are_equal(library: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    works, steps, blocks = shape
    loads = [sum(s[2] - s[1] for s in segments(library, works, steps, blocks, b)) for b in range(blocks)]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_blocks_wait_only_for_lower_numbers_that_have_not_waited(
    library: ctypes.CDLL, shape: tuple[int, int, int]
) -> None:
    works, steps, blocks = shape
    left: dict[int, int] = {}  # block -> tile whose sums it leaves
    waits: dict[int, tuple[int, int]] = {}  # block -> (tile, the first block that it waits for)
    for b in range(blocks):
        for tile, first, last, beginner in segments(library, works, steps, blocks, b):
            assert b not in waits, "who waits has nothing left to do for others"
            if last < steps:
                left[b] = tile
            elif first > 0:
                assert beginner < b
                waits[b] = (tile, beginner)
    for b, (tile, beginner) in waits.items():
        assert [left[other] for other in range(beginner, b)] == [tile] * (b - beginner)
    assert sum(b - beginner for b, (_, beginner) in waits.items()) == len(left), "flags that stay up"
