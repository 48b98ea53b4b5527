"""Weighted and signed scale search."""

from __future__ import annotations

import torch

from zq.numerics.groups import group
from zq.numerics.qtensor import fake_groups
from zq.numerics.scales import mse, mse_signed
from zq.spec import TensorSpec

SPEC = TensorSpec.parse("int4:g32")


def _weights(seed: int) -> torch.Tensor:
    return torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))


def test_importance_moves_the_error_to_where_it_does_not_matter() -> None:
    x, importance = group(_weights(0), SPEC), torch.ones(1, 2, 32)
    importance[..., :4] = 100
    plain = fake_groups(x, SPEC, mse(x, SPEC, torch.float32)) - x
    weighted = fake_groups(x, SPEC, mse(x, SPEC, torch.float32, importance)) - x
    assert (weighted.square() * importance).sum() < (plain.square() * importance).sum()
    assert weighted.square().sum() > plain.square().sum()


def test_signed_scales_are_never_worse_and_use_both_signs() -> None:
    x = group(_weights(1), SPEC)
    plain, signed = mse(x, SPEC, torch.float32), mse_signed(x, SPEC, torch.float32)
    assert bool((signed.scale < 0).any())
    assert bool((signed.scale > 0).any())
    error = [(fake_groups(x, SPEC, s) - x).square().sum(-1) for s in (plain, signed)]
    assert bool((error[1] <= error[0]).all())
    assert error[1].sum() < 0.98 * error[0].sum()


def test_a_symmetric_range_needs_no_sign() -> None:
    narrow = TensorSpec.parse("int4:g32:narrow")
    x = group(_weights(2), narrow)
    assert bool((mse_signed(x, narrow, torch.float32).scale > 0).all())
