"""The optimizer benchmark: rows of one seed share weights and batches, and the table says what diverged."""

from __future__ import annotations

import math

import optim
import pytest
import torch
from tables import optim as table


def bench(steps: int = 3) -> optim.Bench:
    data = torch.arange(4000) % 256
    held = optim.windows(data, torch.arange(0, 400, 100))
    return optim.Bench(data, held, steps, 3e-3, 32, 1, "cpu")


def test_rows_start_alike_and_repeat():
    first, again = (bench().run(optim.ROWS["32 bit"], 1) for _ in range(2))
    assert first["loss"] == again["loss"]
    assert first["loss"] != bench().run(optim.ROWS["32 bit"], 2)["loss"]
    assert bench(0).run(optim.ROWS["32 bit"], 1)["loss"] == bench(0).run(optim.ROWS["4 bit"], 1)["loss"]


@pytest.mark.parametrize("name", optim.ROWS)
def test_every_row_runs(name: str):
    found = bench().run(optim.ROWS[name], 0)
    assert found["parameters"] > 0
    assert found["state bytes per parameter"] <= 8
    assert found["saved bytes per parameter"] > found["state bytes per parameter"]


def test_byte_frequencies_are_an_entropy():
    even = torch.arange(256 * 50) % 256
    assert optim.frequencies(even, even) == pytest.approx(math.log(256), abs=1e-6)


def test_what_diverged_is_counted_and_left_out_of_the_mean():
    def row(scheme: str, seed: int, loss: float | None):
        more = {
            "highest training loss": loss,
            "state bytes per parameter": 2.0,
            "saved bytes per parameter": 2.1,
        }
        place = {"table": "optim", "scheme": scheme, "method": "adamw", "seed": seed}
        return {**place, "loss": loss, **more}

    rows = [row("32 bit", 0, 2.0), row("32 bit", 1, 2.2), row("B", 0, 2.1), row("B", 1, None)]
    rows += [row("C", 0, 3.5), row("C", 1, 2.4)]
    protocol = {"loss of byte frequencies": 3.0, "steps": 9, "rate": 0.1, "width": 8, "blocks": 1}
    text = table({"environment": {"device": "abacus"}, "protocol": protocol, "rows": rows})
    assert "| 32 bit | 2.100 ± 0.141 |  | 0 of 2 | 2.20 |" in text
    assert "| B | 2.100 ± 0.000 | +0.100 ± 0.000 | 1 of 2 | Inf |" in text
    assert "| C | 2.400 ± 0.000 | +0.200 ± 0.000 | 1 of 2 | 3.50 |" in text
    assert "9 steps, rate 0.1, width 8, depth 1. abacus" in text
