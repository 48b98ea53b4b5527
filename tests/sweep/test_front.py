"""Fronts and intervals against the definition, done the slow way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zq.sweep.front import best_within, budgets, interval, on_front, resampled, shares

few = st.integers(1, 5)
cells = st.lists(st.tuples(few, few), min_size=1, max_size=9)


@given(cells)
def test_the_front_is_what_nothing_dominates(pairs):
    """Few different numbers, so that there are many ties."""
    sizes = torch.tensor([float(s) for s, _ in pairs])
    values = torch.tensor([float(v) for _, v in pairs])
    for i, (size, value) in enumerate(pairs):
        dominated = any((s <= size and v < value) or (s < size and v <= value) for s, v in pairs)
        assert bool(on_front(sizes, values)[i]) is not dominated


@given(cells, st.integers(0, 6))
def test_the_best_within_a_budget_is_on_the_front(pairs, extra):
    sizes = torch.tensor([float(s) for s, _ in pairs])
    values = torch.tensor([float(v) for _, v in pairs])
    budget = float(sizes.min()) + extra
    best = int(best_within(sizes, values, budget))
    assert sizes[best] <= budget
    assert values[best] == min(v for s, v in pairs if s <= budget)
    assert bool(on_front(sizes, values)[best])


def test_a_batch_of_values_is_each_on_its_own():
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 9, (12,), generator=generator).double()
    values = torch.randint(1, 9, (40, 12), generator=generator).double()
    together, best = on_front(sizes, values), best_within(sizes, values, 6.0)
    for i in range(40):
        assert torch.equal(together[i], on_front(sizes, values[i]))
        assert best[i] == best_within(sizes, values[i], 6.0)


def test_resamples_are_means_of_drawn_windows_the_same_for_every_cell():
    values = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = resampled(torch.cat([values, values[:1] + 5]), 500, seed=3)
    assert means.shape == (500, 4)
    torch.testing.assert_close(means[:, 3], means[:, 0] + 5)  # paired: the difference has no spread
    draws = torch.randint(7, (500, 7), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(means[:, :3], values[:, draws].mean(-1).T)
    assert torch.equal(means, resampled(torch.cat([values, values[:1] + 5]), 500, seed=3))


def test_intervals_cover_the_true_mean_about_as_often_as_they_say():
    generator = torch.Generator().manual_seed(5)
    hits = 0
    for i in range(300):
        low, high = interval(resampled(torch.randn(1, 40, generator=generator), 400, seed=i)[:, 0])
        hits += low <= 0 <= high
    assert 0.90 <= hits / 300 <= 0.98


def test_the_spread_of_resamples_is_the_standard_error():
    values = torch.randn(1, 200, generator=torch.Generator().manual_seed(2))
    spread = resampled(values, 4000).std().item()
    assert spread == pytest.approx(values.std().item() / math.sqrt(200), rel=0.06)


def test_shares():
    assert shares(torch.tensor([0, 0, 1, 2]), [3, 4, 3, 8]) == {3: 0.75, 4: 0.25}


def test_budgets_reach_from_the_smallest_to_the_largest():
    found = budgets(torch.tensor([96_700_123.0, 269_000_001.0, 113e6], dtype=torch.float64), 12)
    assert len(found) == 12
    assert found[0] == 96_800_000
    assert found[-1] == 270_000_000  # three digits, and the largest cell fits in
    assert found == sorted(found)
    assert budgets(torch.tensor([5.0, 5.0])) == [5]
