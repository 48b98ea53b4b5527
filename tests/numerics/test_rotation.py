"""Rotations are orthogonal, the same for the same seed, and fold into a weight as dense products do."""

from __future__ import annotations

import pytest
import torch

import zq.numerics.rotation as rotation
from zq.numerics.rotation import Rotation, hadamard_rotation, random_rotation, rotate_weight


def dense(r: Rotation) -> torch.Tensor:
    return r.apply(torch.eye(r.size, dtype=torch.float64))


def make(kind: str, size: int, seed: str = "0") -> Rotation:
    made = random_rotation(size, seed) if kind == "random" else hadamard_rotation(size, seed)
    assert made is not None
    return made


@pytest.mark.parametrize("size", [1, 2, 12, 64, 92, 96, 576])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_orthogonal(kind: str, size: int) -> None:
    q = dense(make(kind, size))
    assert torch.allclose(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
    if kind == "hadamard":
        assert torch.allclose(q.abs(), torch.full_like(q, size**-0.5), atol=1e-15)


@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_the_seed_decides(kind: str) -> None:
    assert torch.equal(dense(make(kind, 64)), dense(make(kind, 64)))
    assert not torch.equal(dense(make(kind, 64)), dense(make(kind, 64, "1")))


def test_signs_come_in_both_kinds() -> None:
    assert 10 < int((make("hadamard", 64).signs > 0).sum()) < 54


def test_a_size_without_a_hadamard_matrix() -> None:
    assert hadamard_rotation(94, "0") is None
    assert random_rotation(94, "0").size == 94


@pytest.mark.parametrize("outputs", [None, 8, 24])
@pytest.mark.parametrize("inputs", [None, 16, 32])
@pytest.mark.parametrize("with_gamma", [False, True])
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_folding_is_the_dense_product(
    outputs: int | None, inputs: int | None, with_gamma: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out^T W diag(gamma) In with block-diagonal matrices, whatever the parts it is computed in."""
    monkeypatch.setattr(rotation, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 32, generator=generator)
    gamma = torch.randn(32, generator=generator) if with_gamma else None
    left = make("hadamard", outputs, "l") if outputs else None
    right = make("hadamard", inputs, "r") if inputs else None
    got = rotate_weight(weight, left, gamma, right, "cpu")
    wide = weight.double() * (gamma.double() if gamma is not None else 1)
    if right:
        wide = wide @ torch.block_diag(*[dense(right)] * (32 // right.size))
    if left:
        wide = torch.block_diag(*[dense(left)] * (24 // left.size)).T @ wide
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), wide, atol=1e-6)


def test_sums_of_bfloat16_weights_are_exact() -> None:
    """So the order in which threads add does not matter: the same values in another order, the same bits."""
    weight = torch.randn(8, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    r = make("hadamard", 576)
    runs = (weight.double() * r.signs).reshape(8, 16, 36)
    order = torch.randperm(36, generator=torch.Generator().manual_seed(1))
    assert torch.equal(runs @ r.base, runs[..., order] @ r.base[order])


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(1, 576, dtype=torch.float64)
    x[0, 17] = 24.0
    assert torch.allclose(make("hadamard", 576).apply(x).abs(), torch.ones(1, 576, dtype=torch.float64))
