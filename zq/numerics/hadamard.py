"""Hadamard matrices: entries +1 and -1, H H^T = n I. Built, not listed.

    Sylvester    n = 2^k         H_2n = [[H, H], [H, -H]]
    Paley I      n = q + 1       I + S, S the skew conference matrix of the squares mod q, q = 3 mod 4 prime
    Paley II     n = 2 (q + 1)   C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]], q = 1 mod 4 prime
    Williamson   n = 4 t         [[A, B, C, D], [-B, A, -D, C], [-C, D, A, -B], [-D, -C, B, A]]

C (Paley II) is the symmetric conference matrix of q. A, B, C, D are symmetric circulants whose squares add
up to 4 t I; williamson.txt holds their first rows, found by a search for sequences with such spectra. The
Kronecker product of two Hadamard matrices is one: a size 2^k m takes Sylvester's and one of the others.
(Paley 1933, doi:10.1002/sapm1933121311; Williamson 1944, doi:10.1215/S0012-7094-44-01108-7.)
"""

from __future__ import annotations

from functools import cache
from importlib import resources

import torch
from torch import Tensor


def split(n: int) -> tuple[int, int] | None:
    """(2^k, m) with n = 2^k m, m the smallest order that one of the constructions has (1 for a power of
    two); None when there is none."""
    power = n & -n
    if n < 1:
        return None
    if power == n:
        return n, 1
    while power >= 1:
        if _constructible(n // power):
            return power, n // power
        power //= 2
    return None


def base(m: int) -> Tensor:
    """The Hadamard matrix of an order m that `split` gave: int8 [m, m]."""
    if m == 1:
        return torch.ones(1, 1, dtype=torch.int8)
    if _is_prime(m - 1) and m % 4 == 0:
        return _paley_one(m - 1)
    if _is_prime(m // 2 - 1) and m % 8 == 4:
        return _paley_two(m // 2 - 1)
    return _williamson(m // 4)


def walsh(x: Tensor) -> Tensor:
    """x [..., n, m], n a power of two -> H x along the dimension before the last, H Sylvester's matrix, in
    log2(n) passes."""
    *lead, n, m = x.shape
    half = 1
    while half < n:
        pairs = x.reshape(*lead, n // (2 * half), 2, half, m)
        first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
        x = torch.stack((first + second, first - second), dim=-3)
        half *= 2
    return x.reshape(*lead, n, m)


def williamson_rows() -> dict[int, tuple[str, ...]]:
    """t -> first rows of A, B, C and D, as text of + and -."""
    text = (resources.files("zq") / "numerics" / "williamson.txt").read_text(encoding="utf-8")
    return {int(t): tuple(rows) for t, *rows in map(str.split, text.splitlines())}


def _constructible(m: int) -> bool:
    paley = (m % 4 == 0 and _is_prime(m - 1)) or (m % 8 == 4 and _is_prime(m // 2 - 1))
    return paley or (m % 4 == 0 and m // 4 in _williamson_orders())


@cache
def _williamson_orders() -> frozenset[int]:
    return frozenset(williamson_rows())


def _is_prime(q: int) -> bool:
    return q > 2 and all(q % d for d in range(2, int(q**0.5) + 1))


def _residues(q: int) -> Tensor:
    """[q, q]: +1 where j - i is a square mod q, -1 where it is not, 0 where i = j."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0] + [1 if i in squares else -1 for i in range(1, q)], dtype=torch.int8)
    i = torch.arange(q)
    return character[(i[None] - i[:, None]) % q]


def _conference(q: int, corner: int) -> Tensor:
    """The residues with a border: 1 in the first row, `corner` in the first column, 0 where they meet."""
    c = torch.ones(q + 1, q + 1, dtype=torch.int8)
    c[0, 0], c[1:, 0], c[1:, 1:] = 0, corner, _residues(q)
    return c


def _paley_one(q: int) -> Tensor:
    return _conference(q, -1) + torch.eye(q + 1, dtype=torch.int8)


def _paley_two(q: int) -> Tensor:
    plus = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
    minus = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
    return torch.kron(_conference(q, 1), plus) + torch.kron(torch.eye(q + 1, dtype=torch.int8), minus)


def _williamson(t: int) -> Tensor:
    i = torch.arange(t)
    shift = (i[None] - i[:, None]) % t
    rows = [torch.tensor([1 if sign == "+" else -1 for sign in row]) for row in williamson_rows()[t]]
    a, b, c, d = (row.to(torch.int8)[shift] for row in rows)
    blocks = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.cat([torch.cat(line, 1) for line in blocks])
