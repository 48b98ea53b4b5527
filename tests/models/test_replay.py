"""On a CPU nothing is recorded; which calls may share a recording does not depend on a device."""

from __future__ import annotations

import torch

from zq.models.replay import _same, on_each, recorded


def test_on_a_cpu_a_step_is_itself() -> None:
    def step() -> torch.Tensor:
        return torch.zeros(1)

    assert recorded(step, torch.device("cpu")) is step


def test_every_batch_that_was_asked_for() -> None:
    batches = [torch.full((2,), float(i)) for i in range(12)]
    calls = [{"scale": i} for i in range(12)]
    found = on_each(lambda x, i: x * calls[i]["scale"], batches, range(1, 12, 2), calls)
    assert [x.tolist() for x in found] == [[float(i * i)] * 2 for i in range(1, 12, 2)]


def test_calls_that_may_share_a_recording() -> None:
    mask, table = torch.ones(3), torch.ones(3)
    call = {"args": (mask, None), "kwargs": {"table": (table, 2), "cache": None}}
    assert _same(call, {"args": (mask, None), "kwargs": {"table": (table, 2), "cache": None}})
    assert not _same(call, {"args": (mask.clone(), None), "kwargs": {"table": (table, 2), "cache": None}})
    assert not _same(call, {"args": (mask, None), "kwargs": {"table": (table, 3), "cache": None}})
    assert not _same(call, {"args": (mask, None), "kwargs": {"table": (table, 2)}})
    assert not _same(call, {"args": (mask, table), "kwargs": {"table": (table, 2), "cache": None}})
