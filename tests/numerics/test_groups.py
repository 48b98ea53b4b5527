"""Which values share a scale, spelled out by loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.numerics.strategies import LAYOUTS, matrices
from zq.numerics.groups import group, grouped_scale, stored_scale, ungroup
from zq.spec import TensorSpec, scale_shape


def spec_of(layout: str) -> TensorSpec:
    return TensorSpec.parse(f"int8:{layout}")


def members(n: int, k: int, layout: str) -> list[list[tuple[int, int] | None]]:
    """For each scale, in stored order, the positions that share it; None: beyond the edge."""
    every: list[tuple[int, int] | None] = [(i, j) for i in range(n) for j in range(k)]
    if layout == "tensor":
        return [every]
    if layout in ("channel", "token"):
        return [[(i, j) for j in range(k)] for i in range(n)]
    if "x" in layout:
        tall, wide = (min(pair) for pair in zip(map(int, layout.split("x")), (n, k), strict=True))
        corners = [(i, j) for i in range(0, n, tall) for j in range(0, k, wide)]
        inside = [[(i + a, j + b) for a in range(tall) for b in range(wide)] for i, j in corners]
        return [[at if at[0] < n and at[1] < k else None for at in places] for places in inside]
    size = int(layout[1:])
    if layout[0] == "b":
        return [every[at : at + size] for at in range(0, n * k, size)]
    return [[(i, j) for j in range(at, min(at + size, k))] for i in range(n) for at in range(0, k, size)]


@given(matrices(), st.sampled_from([x for x in LAYOUTS if x != "rank1"]))
def test_groups_hold_the_values_that_the_layout_says(x: torch.Tensor, layout: str) -> None:
    spec, (n, k) = spec_of(layout), x.shape
    grouped = group(x, spec)
    wanted = members(n, k, layout)
    flat = grouped.reshape(-1, grouped.shape[-1])
    assert len(flat) == len(wanted)
    for row, places in zip(flat, wanted, strict=True):
        assert row[: len(places)].tolist() == [float(x[p]) if p else 0.0 for p in places]
        assert not row[len(places) :].any()
    assert torch.equal(ungroup(grouped, (n, k), spec), x)
    scales = torch.arange(len(wanted), dtype=torch.float32).reshape(grouped.shape[:2])
    stored = stored_scale(scales, (n, k), spec)
    assert tuple(stored.shape) == scale_shape(spec, (n, k))
    assert torch.equal(grouped_scale(stored, spec), scales)


@pytest.mark.parametrize("layout", ["tensor", "channel", "g4", "b8", "9999999x9999999"])
def test_nothing_is_copied_where_nothing_is_padded(layout: str) -> None:
    x = torch.randn(4, 8)
    assert group(x, spec_of(layout)).data_ptr() == x.data_ptr()
