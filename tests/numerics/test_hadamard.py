"""H H^T = n I in integers, for every order that the code says it can build."""

from __future__ import annotations

import pytest
import torch

from zq.numerics.hadamard import base, split, walsh, williamson_rows

MODELS = (64, 80, 96, 112, 128, 160, 192, 256, 576, 768, 896, 960, 1024, 1152, 1280, 1536, 2048, 2304, 2560)
MODELS += (3072, 3200, 3584, 4096, 4544, 5120, 5376, 6144, 6656, 7168, 8192, 9728, 11008, 12288, 13824)
MODELS += (14336, 16384, 18432, 18944, 27648, 29568)
# The orders up to 512 that only constructions reach that are not here.
MISSING = (188, 236, 244, 260, 268, 292, 324, 340, 356, 372, 376, 404, 412, 428, 436, 452, 472, 476, 508)


def sylvester(n: int) -> torch.Tensor:
    h = torch.ones(1, 1, dtype=torch.int64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


def is_hadamard(h: torch.Tensor) -> bool:
    n = len(h)
    ones = set(h.unique().tolist()) <= {-1, 1}
    product = h.double() @ h.T.double()  # whole numbers below 2^53: exact
    return ones and torch.equal(product, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("order", sorted({s[1] for n in range(1, 513) if (s := split(n))}))
def test_every_base_up_to_512(order: int) -> None:
    assert base(order).shape == (order, order)
    assert is_hadamard(base(order))


def test_which_sizes_there_are() -> None:
    found = {n for n in range(1, 513) if split(n)}
    assert found == {1, 2, *range(4, 513, 4)} - set(MISSING)
    assert split(0) is None


@pytest.mark.parametrize("n", MODELS)
def test_the_sizes_of_real_models(n: int) -> None:
    found = split(n)
    assert found
    power, order = found
    assert power * order == n
    assert power & (power - 1) == 0
    assert is_hadamard(base(order))
    assert split(order) == (1, order), "the smallest that will do"


def test_the_sequences_of_the_file() -> None:
    """Symmetric, +1 and -1, and the squares of their circulants add up to 4 t I."""
    rows = williamson_rows()
    assert sorted(rows) == [13, 23, 25, 29, 39, 43]
    for t, four in rows.items():
        assert len(four) == 4
        total = torch.zeros(t, t, dtype=torch.int64)
        for row in four:
            assert set(row) == {"+", "-"}
            assert row[1:] == row[:0:-1]
            sequence = torch.tensor([1 if sign == "+" else -1 for sign in row])
            circulant = torch.stack([sequence.roll(i) for i in range(t)])
            total += circulant @ circulant
        assert torch.equal(total, 4 * t * torch.eye(t, dtype=torch.int64))
        assert split(4 * t) == (1, 4 * t)


def test_one_wrong_sign_is_noticed() -> None:
    h = base(92).clone()
    h[3, 5] = -h[3, 5]
    assert not is_hadamard(h)


@pytest.mark.parametrize("n", [1, 2, 4, 32])
def test_walsh_is_the_product_with_sylvesters_matrix(n: int) -> None:
    x = torch.randint(-9, 10, (3, 2, n, 5), generator=torch.Generator().manual_seed(0))
    assert torch.equal(walsh(x), torch.einsum("ij,abjk->abik", sylvester(n), x))
