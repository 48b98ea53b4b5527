"""The benchmark of integer training: every row runs, and the reference of the variances is what it says."""

from __future__ import annotations

import integer
import optim
import pages
import pytest
import torch

from zq.distill.integer import IntegerLinear, Precision
from zq.distill.norms import L1Norm


def bench(steps: int = 3) -> optim.Bench:
    data = torch.arange(4000) % 256
    held = optim.windows(data, torch.arange(0, 400, 100))
    return optim.Bench(data, held, steps, 3e-3, 32, 1, "cpu")


@pytest.mark.parametrize("name", integer.ROWS)
def test_every_row_is_what_it_says(name: str):
    precision, l1 = integer.ROWS[name]
    models: list[optim.Model] = []

    def change(model: optim.Model) -> None:
        integer.change(model, precision, l1)
        models.append(model)

    assert bench().run(optim.Row(32), 0, change)["loss"] > 0
    kinds = [type(module) for module in models[0].modules()]
    assert kinds.count(IntegerLinear) == (4 if precision else 0)
    assert (L1Norm in kinds) == l1


def test_gradients_of_every_layer_but_the_last():
    assert [tuple(g.shape) for g in integer.gradients(bench(), 0)] == [
        (16 * 64, 32),
        (16 * 64, 128),
        (16 * 64, 32),
        (16 * 64, 96),
    ]


@pytest.mark.parametrize("bits", [4, 8])
def test_even_columns_have_the_variance_of_their_own_scales(bits: int):
    torch.manual_seed(0)
    even = torch.rand(4000, 400) * 2 - 1
    assert integer.variances([even], Precision(bits, 1), shared=True) == pytest.approx(1, rel=0.02)
    spread = even * torch.logspace(-2, 0, 400, 2)
    assert integer.variances([spread], Precision(bits, 1), shared=True) > 1.5


def test_tables():
    def row(table: str, scheme: str, **more):
        return {"table": table, "scheme": scheme, "method": "adamw", "seed": 0, "seconds": 3.0, **more}

    rows = [
        row("integer", "float", loss=2.0, **{"highest training loss": 4.0}),
        row("integer", "8 bit", loss=2.1, **{"highest training loss": 4.0}),
        row("variance", "8 bit, 1", ratio=1.5),
    ]
    protocol = {"loss of byte frequencies": 3.0, "steps": 9, "rate": 0.1, "width": 8, "blocks": 1}
    text = pages.all_tables({"environment": {"device": "abacus"}, "protocol": protocol, "rows": rows})
    assert "| 8 bit | 2.100 ± 0.000 | +0.100 ± 0.000 | 0 of 1 | 4.00 | 3 |" in text
    assert "| 8 bit, 1 | 1.50 |" in text
