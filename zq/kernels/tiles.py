"""Which kernel computes a product, in what tiles: a pure function of the shape and the device.

A block computes `rows` rows of W for `tokens` tokens; entry `t64` means 64 tokens. On sm_90a (gemm_sm90.cu)
blocks are persistent and form clusters, elsewhere (gemm_mma.cu) there is one block for each tile and share
of K. Few tokens leave fewer tiles than multiprocessors: then K is split. Larger tiles are compared by what
the clocks below add up to.
"""

from __future__ import annotations

from dataclasses import dataclass

from zq.errors import ZqError
from zq.kernels.layout import STEP, Packing

KINDS = {  # operator -> kind of packing
    "w8a8_int8": "w8a8",
    "w8a8_fp8": "w8a8",
    "fp8_block128": "fp8_block",
    "w4a8_int8": "w4a8_two",
    "w4a8_int8_group": "w4a8_group",
    "w4a8_fp8": "w4a8_fp8",
    "w4a16": "w4a16",
    "w8a16": "w8a16",
}
SHARED = 227 * 1024  # bytes of shared memory of a block on sm_90; a multiprocessor has 1 KB more for each
STAGES = 16  # of a ring, at most: 150 KB in flight are several times what hides the latency of memory
PITCH = 144  # of gemm_sm90.cu
SPLITS = (1, 2, 4, 8)  # of gemm_mma.cu
CLUSTERS = range(1, 9)  # blocks that share K in gemm_sm90.cu
FEWEST = 16  # tokens, up to which two blocks share a multiprocessor
LEAST_STEPS = 4  # of a share of K

# Microseconds, fitted to 1,100 times of W4A8-INT8 and W8A8-INT8 on an H200, and even shares to bursts of all
# schemes: for choosing, not for predicting. On average it takes what is 1 to 2 % slower than the fastest way.
RATE = 7.2e6  # multiply-adds of 8 bits that a multiprocessor makes in one
WEIGHTS = {4: 0.227, 8: 0.329}  # to bring and convert the weights of 128 rows and a step, by their bits
WIDE_WEIGHTS = 0.31  # the same of 4 bits for 16-bit activations
CHAIN = {4: 0.327, 8: 0.21}  # a step of a block that has its multiprocessor for itself, at least
MEMORY = 4.4e6  # bytes of weights that come in one
LAUNCH, TILE, WRITE = 1.32, 0.3, 0.0151  # a launch; a tile; to write a token of 128 rows
SPLIT, MERGE = 0.051, 0.016  # for each block that K is shared with, and each token of 128 rows
EVEN = {1: 3.25, 2: 4.9}  # even shares: flags and workspace, by how many blocks a multiprocessor runs
EVEN_LARGE = 4.0  # more of it with the largest tiles, whose blocks then read W and x further apart
TAKE = 0.0049  # a token of 128 rows of another block's sums
NARROW = 1.05  # tiles of 128 rows read an x of 16 bits twice as often
LATE = 1.3  # where more than half of the machine is taken, the next kernel begins late
ROOM = {
    3: 0.88,
    4: 0.9,
    5: 0.83,
    6: 0.77,
    7: 0.72,
    8: 0.72,
}  # of the machine that clusters of a size can fill


@dataclass(frozen=True)
class Config:
    """A launch: `unit` and `entry` name the kernel, `shared` is in bytes, `cluster` and `split` count blocks.
    split: blocks that share K of each tile; 0: all blocks share all tiles evenly (share90.cuh).
    workspace: bytes, of which the first `zeroed` are zero before and after. pdl: may begin before the kernel
    in front of it has ended. map_rows: rows in a box of the tensor map of x, 0 when the kernel takes none."""

    unit: str
    entry: str
    grid: tuple[int, int, int]
    block: int
    shared: int
    cluster: int = 1
    split: int = 1
    workspace: int = 0
    zeroed: int = 0
    pdl: bool = False
    map_rows: int = 0


@dataclass(frozen=True)
class Tile:
    """tokens x rows of y, computed by one block."""

    tokens: int
    rows: int = 128

    @property
    def entry(self) -> str:
        return f"t{self.tokens}" + ("x2" if self.rows == 256 else "")


def packing(op: str, group: int = 0, asym: bool = False, half: bool = False) -> Packing:
    """The packing that an operator's weight has. group: 0 = one scale per channel. Raises ZqError."""
    return Packing(KINDS[op], group, asym, half and op in ("w4a16", "w8a16"))


def unit_name(op: str, p: Packing, arch: int) -> str:
    """ "sm90_w4a8_int8_g128" """
    family = "sm90" if arch == 90 else "mma"
    return "_".join([family, op, *[f"g{p.group}"] * (p.group > 0), *["asym"] * p.asym, *["fp16"] * p.half])


def has_parts(op: str, p: Packing) -> bool:
    """Whether sums leave the tensor core before the end of K, and so take registers twice."""
    return op in ("w8a8_fp8", "fp8_block128", "w4a8_fp8") or (op == "w4a8_int8_group" and p.group > 0)


def tiles(op: str, p: Packing, arch: int) -> tuple[Tile, ...]:
    """The tiles that a kernel is compiled for, smallest first."""
    small = (Tile(8), Tile(16), Tile(32), Tile(64))
    one_sum, short = not has_parts(op, p), p.act_bytes == 1
    if arch == 90:
        return (*small, Tile(128), *[Tile(256)] * (one_sum and short), *[Tile(128, 256)] * one_sum)
    return (*small, *[Tile(128)] * (one_sum and short))


def choose(  # noqa: PLR0913 (a shape, a scheme and a device)
    op: str,
    m: int,
    n: int,
    k: int,
    *,
    group: int,
    arch: int,
    sms: int,
    asym: bool = False,
    half: bool = False,
) -> Config:
    """The launch that computes y [M, N] = x [M, K] W^T on a device of `arch` (80, 86, 89, 90, 100, 120) with
    `sms` multiprocessors. group, asym and half (fp16 activations) as in `packing`. Raises ZqError."""
    p = packing(op, group, asym, half)
    if "fp8" in op and arch < 89:
        raise ZqError(
            f"{op} needs FP8 tensor cores, which sm_{arch} has not (sm_89 and newer); use INT8 activations"
        )
    if p.act_bytes == 1 and "int8" in op and k > 65536:
        raise ZqError(f"{op} sums up to 65536 products in INT32, and K is {k}; compute without kernels")
    if arch == 90:
        return _persistent(op, p, m, n, k, sms)
    return _portable(op, p, m, n, k, arch, sms)


def turns(op: str, p: Packing, tile: Tile) -> int:
    """How many pairs of consumer warpgroups a block of gemm_sm90.cu has: two where registers allow it and
    waiting takes longer than computing."""
    return 2 if FEWEST < tile.tokens <= (32 if has_parts(op, p) else 64) else 1


def resident(tile: Tile) -> int:
    """How many blocks of gemm_sm90.cu a multiprocessor runs at once."""
    return 2 if tile.tokens <= FEWEST else 1


def stages_and_shared(op: str, p: Packing, tile: Tile) -> tuple[int, int]:
    """(stages of the ring, bytes of shared memory) of gemm_sm90.cu; it finds the first from the second."""
    tokens = tile.tokens
    turn = 2 * min(tokens, 64) * PITCH
    extra = max(turn, tile.rows * tokens * 4) if tokens <= 64 else turn
    extra += 16 * tokens + 6 * tile.rows  # terms: two of each token, for both warpgroups; scale and bias
    stage = tokens * 128 * p.act_bytes + tile.rows // 64 * p.tile_bytes + 16  # two barriers
    stage += 4 * tokens * (op == "fp8_block128")
    pairs = turns(op, p, tile)
    room = SHARED if resident(tile) == 1 else SHARED // 2 - 512  # each has 1 KB beside its own
    stages = min(STAGES, (room - extra) // stage) // pairs * pairs
    return stages, extra + stages * stage


def _persistent(op: str, p: Packing, m: int, n: int, k: int, sms: int) -> Config:
    steps = -(-k // STEP)
    options = []
    for tile in tiles(op, p, 90):
        works, places = _works(tile, 1, m, n), sms * resident(tile)
        if tile.tokens < min(m, 32) or (tile.tokens >= 2 * m and tile.tokens > 8):
            continue  # others read all weights once, or half of it does
        least = LEAST_STEPS if tile.tokens <= FEWEST else LEAST_STEPS + 2
        options += [
            (tile, split)
            for split in CLUSTERS
            if split == 1
            or (tile.tokens <= 64 and steps >= least * split and works * split <= _room(tile, split, sms))
        ]
        slower = p.kind == "fp8_block" and resident(tile) == 2  # 62 microseconds where whole tiles take 58
        if works * steps >= LEAST_STEPS * places and not slower:
            options.insert(0, (tile, 0))  # first, so chosen where neither hides what the weights take to come
    tile, split = min(options, key=lambda o: _microseconds(p, o[0], o[1], m, n, steps, sms))
    return persistent(op, p, tile, max(split, 1), split, (m, n, k), sms)


def _room(tile: Tile, split: int, sms: int) -> int:
    """Blocks that run at once in clusters of `split`: clusters do not cross groups of multiprocessors."""
    return int(sms * resident(tile) * ROOM.get(split, 1))


def persistent(
    op: str, p: Packing, tile: Tile, cluster: int, split: int, shape: tuple[int, int, int], sms: int
) -> Config:
    """The launch of gemm_sm90.cu with this tile: a cluster shares x (split = 1) or K (split = cluster), or
    all blocks share all tiles (split = 0)."""
    m, n, k = shape
    works, places = _works(tile, cluster // max(split, 1), m, n), sms * resident(tile)
    grid = works * split if split > 1 else min(works, places // cluster) * cluster
    zeroed = scratch = 0
    if split == 0:
        grid = min(places, works * -(-k // STEP))
        zeroed = -(-8 * grid // 16) * 16
        scratch = 4 * tile.rows * tile.tokens * grid
    return Config(
        unit=unit_name(op, p, 90),
        entry=tile.entry,
        grid=(grid, 1, 1),
        block=128 + 256 * turns(op, p, tile),
        shared=stages_and_shared(op, p, tile)[1],
        cluster=cluster,
        split=split,
        workspace=zeroed + scratch,
        zeroed=zeroed,
        pdl=True,
        map_rows=tile.tokens * max(split, 1) // cluster,
    )


def _works(tile: Tile, sharing: int, m: int, n: int) -> int:
    """How many clusters' worth of tiles there are; `sharing` blocks take neighbouring rows of W."""
    return -(-m // tile.tokens) * -(-n // (tile.rows * sharing))


def _microseconds(p: Packing, tile: Tile, split: int, m: int, n: int, steps: int, sms: int) -> float:
    """Estimated time of a product: rounds of steps, in each of which the tensor core, the weights or waiting
    takes longest. Blocks of a cluster that share x have never been faster, so none are considered."""
    heights, works, r = tile.rows // 128, _works(tile, 1, m, n), resident(tile)
    tokens, places, blocks = tile.tokens * heights, sms * r, works * max(split, 1)
    multiply = tokens * 128 * STEP * p.act_bytes / RATE
    multiply *= NARROW if p.act_bytes == 2 and heights == 1 else 1
    weights = heights * (WIDE_WEIGHTS if p.act_bytes == 2 and p.bits == 4 else WEIGHTS[p.bits])

    def step(together: int) -> float:
        return max(CHAIN[p.bits] * heights, together * weights, together * multiply)

    least = works / -(-m // tile.tokens) * tile.rows // 64 * p.tile_bytes * steps / MEMORY
    write, late = TILE + tokens * WRITE, LATE * (blocks > places / 2)
    if split == 0:
        ended, taken = -(-works // places), min(-(-places // works), 8)
        shared = EVEN[r] + (tile.tokens >= 256) * EVEN_LARGE + tokens * taken * TAKE
        return LAUNCH + max(-(-works * steps // places) * step(r) + shared, least) + ended * write + LATE
    rounds = -(-blocks // (_room(tile, split, sms) if split > 1 else places))
    # Larger clusters are packed: they share multiprocessors while others have nothing to do.
    together = r if split > 2 else min(r, -(-blocks // sms))
    merge = (split - 1) * (SPLIT + tokens * MERGE)
    return LAUNCH + max(rounds * -(-steps // split) * step(together), least) + rounds * (write + merge) + late


def _portable(op: str, p: Packing, m: int, n: int, k: int, arch: int, sms: int) -> Config:
    choices = tiles(op, p, arch)
    tile = next((t for t in choices if t.tokens >= m), choices[-1])
    blocks, steps = -(-n // 128) * -(-m // tile.tokens), -(-k // STEP)
    split = max(s for s in SPLITS if s == 1 or (blocks * s <= 2 * sms and steps >= s * LEAST_STEPS))
    return portable(op, p, tile, split, (m, n), arch)


def portable(op: str, p: Packing, tile: Tile, split: int, shape: tuple[int, int], arch: int) -> Config:
    """The launch of gemm_mma.cu with this tile and K in `split` shares."""
    blocks = _works(tile, 1, *shape)
    stages = {8: 5, 16: 4, 32: 4, 64: 3, 128: 3}[tile.tokens]  # of gemm_mma.cu
    stage = tile.tokens * 128 * p.act_bytes + 2 * p.tile_bytes + 4 * tile.tokens * (op == "fp8_block128")
    zeroed = -(-blocks * 4 // 16) * 16 if split > 1 else 0
    return Config(
        unit=unit_name(op, p, arch),
        entry=tile.entry,
        grid=(blocks, 1, split),
        block=256,
        shared=stages * stage,
        split=split,
        workspace=zeroed + (blocks * split * 128 * tile.tokens * 4 if split > 1 else 0),
        zeroed=zeroed,
        pdl=arch >= 90,
    )
