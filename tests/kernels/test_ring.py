"""The ring of gemm_sm90.cu as a model: blocks of a cluster, a producer, consumer warps that read ahead and
may take turns, barriers with phases, copies that land at any later time. Under random schedules nothing
waits for ever, and no warp ever sees a stage that is incomplete or overwritten."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

WARPS = 8  # that consume a stage, in a block


@dataclass
class Barrier:
    """mbarrier: a phase ends when `count` arrivals have come and all expected bytes have landed."""

    count: int
    phase: int = 0
    pending: int = 0
    bytes: int = 0

    def __post_init__(self) -> None:
        self.pending = self.count

    def arrive(self, expect: int = 0) -> None:
        assert self.pending > 0
        self.pending -= 1
        self.add(expect)

    def add(self, expect: int) -> None:
        self.bytes += expect
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase ^ 1, self.count

    def over(self, parity: int) -> bool:
        """Whether the phase of this parity is over; the one before the first counts as over."""
        return self.phase != parity


@dataclass
class Block:
    stages: int
    blocks: int
    scaled: bool
    full: list[Barrier] = field(default_factory=list)
    empty: list[Barrier] = field(default_factory=list)
    slots: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.full = [Barrier(2 if self.scaled else 1) for _ in range(self.stages)]
        self.empty = [Barrier(WARPS * self.blocks) for _ in range(self.stages)]
        self.slots = [{} for _ in range(self.stages)]


class Cluster:
    """works x steps of a persistent cluster whose blocks share x; the weights of the first stages precede the
    wait. turns: sets of consumers, of which each takes every turns-th stage that is filled; ahead: steps of
    its own that a consumer has waited for before it releases the one `lag` steps back."""

    def __init__(
        self,
        rng: random.Random,
        stages: int,
        blocks: int,
        shape: tuple[int, int],
        scaled: bool = False,
        turns: int = 1,
        ahead: int = 0,
        lag: int = 1,
    ):
        self.rng, (self.works, self.steps) = rng, shape
        self.turns, self.ahead, self.lag = turns, ahead, lag
        self.blocks = [Block(stages, blocks, scaled) for _ in range(blocks)]
        self.flying: list[Callable[[], None]] = []
        self.running: list[Iterator[Callable[[], bool] | None]] = []
        for rank, block in enumerate(self.blocks):
            self.running.append(self.producer(rank, block))
            self.running += [self.consumer(block, turn) for _ in range(WARPS) for turn in range(turns)]
            if scaled:
                self.running.append(self.scales(block))

    def copy(self, block: Block, slot: int, key: str, value: tuple[int, int]) -> None:
        def land() -> None:
            block.slots[slot][key] = value
            block.full[slot].add(-1)

        self.flying.append(land)

    def producer(self, rank: int, block: Block) -> Iterator[Callable[[], bool] | None]:
        count = len(self.blocks)
        early = min(block.stages, self.steps if self.works else 0)
        for s in range(early):
            block.full[s].arrive(expect=1 + count)
            self.copy(block, s, "w", (0, s))
            yield None
        done, s, phase = 0, 0, 0
        for work in range(self.works):
            for kt in range(self.steps):
                if done >= early:
                    yield lambda b=block.empty[s], p=phase ^ 1: b.over(p)
                    block.full[s].arrive(expect=1 + count)
                    self.copy(block, s, "w", (work, kt))
                for other in self.blocks:
                    self.copy(other, s, f"x{rank}", (work, kt))
                yield None
                done, s = done + 1, s + 1
                if s == block.stages:
                    s, phase = 0, phase ^ 1

    def scales(self, block: Block) -> Iterator[Callable[[], bool] | None]:
        s, phase = 0, 0
        for work in range(self.works):
            for kt in range(self.steps):
                yield lambda b=block.empty[s], p=phase ^ 1: b.over(p)
                block.slots[s]["scales"] = (work, kt)
                block.full[s].arrive()
                s += 1
                if s == block.stages:
                    s, phase = 0, phase ^ 1

    def consumer(self, block: Block, turn: int) -> Iterator[Callable[[], bool] | None]:
        keys = {"w", *(f"x{rank}" for rank in range(len(self.blocks)))} | (
            {"scales"} if block.scaled else set()
        )
        for work in range(self.works):
            begin, waited = work * self.steps, 0
            mine = [kt for kt in range(self.steps) if (begin + kt) % self.turns == turn]
            for j in range(len(mine)):
                for kt in mine[waited : j + self.ahead + 1]:
                    slot, phase = self.place(work, kt, block)
                    yield lambda b=block.full[slot], p=phase: b.over(p)
                    assert block.slots[slot] == dict.fromkeys(keys, (work, kt))
                    waited += 1
                yield None
                if j >= self.lag:
                    self.release(block, work, mine[j - self.lag])
            for kt in mine[len(mine) - self.lag :] if self.lag else []:
                self.release(block, work, kt)

    def place(self, work: int, kt: int, block: Block) -> tuple[int, int]:
        """(stage, parity of its phase)"""
        position = work * self.steps + kt
        return position % block.stages, position // block.stages & 1

    def release(self, block: Block, work: int, kt: int) -> None:
        slot, _ = self.place(work, kt, block)
        assert set(block.slots[slot].values()) == {(work, kt)}, "overwritten while it was read"
        for other in self.blocks:
            other.empty[slot].arrive()

    def run(self) -> None:
        waiting: dict[int, Callable[[], bool] | None] = dict.fromkeys(range(len(self.running)))
        while waiting:
            ready = [i for i, wait in waiting.items() if wait is None or wait()]
            choices = len(ready) + len(self.flying)
            assert choices, "everyone waits"
            at = self.rng.randrange(choices)
            if at >= len(ready):
                self.flying.pop(at - len(ready))()
                continue
            try:
                waiting[ready[at]] = next(self.running[ready[at]])
            except StopIteration:
                del waiting[ready[at]]
        assert not self.flying


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("ahead", "lag"), [(0, 1), (1, 1), (1, 0), (2, 0)])
@pytest.mark.parametrize(("blocks", "turns"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    ("stages", "works", "steps"),
    [(4, 3, 7), (2, 2, 5), (5, 2, 3), (3, 1, 9), (6, 3, 1), (6, 2, 9), (5, 0, 4)],
)
def test_no_schedule_breaks_the_ring(
    stages: int, works: int, steps: int, blocks: int, turns: int, ahead: int, lag: int, scaled: bool
) -> None:
    if stages <= turns * (ahead + lag) or stages % turns:
        pytest.skip("stops or is read too early, see below")
    for seed in range(4):
        Cluster(random.Random(seed), stages, blocks, (works, steps), scaled, turns, ahead, lag).run()


@pytest.mark.parametrize(("turns", "ahead", "lag"), [(1, 1, 1), (2, 1, 1), (1, 2, 0)])
def test_a_ring_that_is_shorter_than_what_is_read_ahead_stops(turns: int, ahead: int, lag: int) -> None:
    with pytest.raises(AssertionError, match="everyone waits"):
        Cluster(random.Random(0), turns * (ahead + lag), 1, (1, 20), False, turns, ahead, lag).run()


def test_stages_must_keep_their_turn() -> None:
    """With an odd number of stages a stage changes hands, and a set may ask for a phase before the one in
    front is over: a barrier cannot tell it from the last but one."""

    def run_all() -> None:
        for seed in range(40):
            Cluster(random.Random(seed), 3, 1, (2, 12), turns=2, ahead=1, lag=0).run()

    with pytest.raises(AssertionError):
        run_all()


def test_the_model_finds_a_release_that_comes_too_early() -> None:
    """A consumer that releases before it reads is caught, so the test above can fail."""

    class Hasty(Cluster):
        def consumer(self, block: Block, turn: int) -> Iterator[Callable[[], bool] | None]:
            s, phase = 0, 0
            for work in range(self.works):
                for kt in range(self.steps):
                    yield lambda b=block.full[s], p=phase: b.over(p)
                    for other in self.blocks:
                        other.empty[s].arrive()
                    yield None
                    assert set(block.slots[s].values()) == {(work, kt)}
                    s += 1
                    if s == block.stages:
                        s, phase = 0, phase ^ 1

    def run_all() -> None:
        for seed in range(20):
            Hasty(random.Random(seed), 2, 1, (2, 6)).run()

    with pytest.raises(AssertionError):
        run_all()
