"""A device without memory: one line, and nothing is left behind but what a resumed run needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.command import run
from tests.simulate import recipe
from zq.checkpoint.job import FOLDER
from zq.errors import OutOfMemory, ZqError, enough_memory
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.quantizers import rtn
from zq.quantizers.method import Block

CUDA = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 10 GiB of which ..."


def plan_of(folder: Path, run_step: Callable[[Block, Any], None] = rtn.run) -> Plan:
    plan = make_plan(folder, recipe("* = int8:channel"))
    ((method, options),) = plan.steps
    return replace(plan, steps=[(replace(method, run=run_step), options)])


def full_at(name: str) -> Callable[[Block, Any], None]:
    def step(block: Block, options: Any) -> None:
        if block.name == name:
            raise torch.OutOfMemoryError(CUDA)
        rtn.run(block, options)

    return step


def test_before_anything_is_done_nothing_is_left(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory) as caught:
        quantize(plan_of(tiny("llama"), full_at("outside")), tmp_path / "out")
    advice = "give fewer --samples and --generated, a shorter --length, or another --device"
    assert str(caught.value) == f"no memory is left for 20.00 GiB more; {advice}"
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_what_is_done_is_kept_and_continues(tiny: Callable[..., Path], tmp_path: Path) -> None:
    quantize(plan_of(tiny("llama")), tmp_path / "whole")
    with pytest.raises(
        OutOfMemory, match=r"--device; what is done is kept: .* or delete \S*\.zq-job$"
    ) as caught:
        quantize(plan_of(tiny("llama"), full_at("model.layers.1")), tmp_path / "out")
    assert caught.value.exit_code == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [FOLDER]
    quantize(plan_of(tiny("llama")), tmp_path / "out", resume=True)
    a, b = ((tmp_path / x / "model.safetensors").read_bytes() for x in ("whole", "out"))
    assert a == b


def test_every_command_says_it_in_a_line(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise torch.OutOfMemoryError(CUDA)

    monkeypatch.setattr("zq.cli.inspect.describe", broken)
    done = run("inspect", tiny("llama"))
    assert done.code == 2
    wanted = "error: no memory is left for 20.00 GiB more; work on less at once, or take another --device"
    assert done.err.splitlines() == [wanted]


def fail(error: Exception, outer: Exception | None) -> None:
    """As a context manager that fails in turn while it closes."""
    try:
        raise error
    except Exception:
        raise outer or error  # noqa: B904


@pytest.mark.parametrize(
    "outer", [None, RuntimeError("operation failed due to a previous error during capture")]
)
@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError(CUDA), " for 20.00 GiB more"),
        (RuntimeError("CUDA error: out of memory"), ""),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), ""),
        (MemoryError(), ""),
    ],
)
def test_what_running_out_of_memory_looks_like(
    error: Exception, outer: Exception | None, wanted: str
) -> None:
    with pytest.raises(OutOfMemory) as caught, enough_memory("advice"):
        fail(error, outer)
    assert str(caught.value) == f"no memory is left{wanted}; advice"


def test_a_real_one_on_a_cpu() -> None:
    with pytest.raises(OutOfMemory) as caught, enough_memory("advice"):
        torch.empty(1 << 60, dtype=torch.uint8)
    assert str(caught.value) == "no memory is left for 1073741824.00 GiB more; advice"


@pytest.mark.parametrize("error", [RuntimeError("a defect"), ZqError("bad input"), KeyError("x")])
def test_other_errors_stay(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, enough_memory("advice"):
        raise error
    assert caught.value is error
