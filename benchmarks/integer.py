"""A small language model trained with integer forward and backward products (zq/distill/integer.py).

    python benchmarks/integer.py --out benchmarks/results/integer-cpu.json         the whole table
    python benchmarks/integer.py --steps 60 --seeds 1 --only "8 bit"               a quick look

Model, text and batches are those of benchmarks/optim.py: the next byte, the loss on 64 windows of other
documents. Every linear layer but the last computes all three products in integers. "one group" has a single
scale for the inner index, as plain integer training has; "L1" has L1 norms in the place of LayerNorm.

The table of variances is about one step after the training of the first row: the gradients that reach the
linear layers, rounded stochastically, their squared error relative to that with a scale of its own for every
inner index, which no integer product can have. Geometric mean over layers and the products that give dX, dW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tables
from optim import Bench, Model, Row, arguments, batches, cross_entropy, measured, refresh
from torch import Tensor, nn

from zq.distill.integer import Precision, encode, integer_layers
from zq.distill.norms import l1_norms

LAST = ("head",)
ROWS: dict[str, tuple[Precision | None, bool]] = {
    "float": (None, False),
    "float, L1": (None, True),
    "8 bit": (Precision(8), False),
    "8 bit, L1": (Precision(8), True),
    "6 bit": (Precision(6), False),
    "6 bit, one group": (Precision(6, 1), False),
    "4 bit": (Precision(4), False),
    "4 bit, one group": (Precision(4, 1), False),
}


def change(model: Model, precision: Precision | None, l1: bool) -> None:
    if l1:
        l1_norms(model)
    if precision:
        integer_layers(model, precision, LAST)


def gradients(bench: Bench, seed: int) -> list[Tensor]:
    """dY [tokens, outputs] of every linear layer but the last, of one batch after training in float."""
    kept: list[Model] = []
    bench.run(Row(32), seed, kept.append)
    model, found = kept[0], []

    def keep(module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        found.append(outputs[0].flatten(0, -2))

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(LAST):
            module.register_full_backward_hook(keep)
    pair = next(batches(bench.data, 1, seed + 1))
    cross_entropy(model, (pair[0].to(bench.device), pair[1].to(bench.device))).backward()
    return found


def variances(found: list[Tensor], precision: Precision, shared: bool) -> float:
    """Squared error against that with a scale for every inner index; geometric mean over operands."""
    ratios = []
    for grad in (g for dy in found for g in (dy, dy.T)):
        # A sixth of a step squared is the error of stochastic rounding, on average over uniform values.
        own = (grad.abs().amax(0) / precision.top).square().mean() / 6
        error = (encode(grad, precision, stochastic=True, shared=shared).dense() - grad).square().mean()
        ratios.append(math.log(float(error / own)))
    return math.exp(sum(ratios) / len(ratios))


def main(report: Callable[[str], None] = print) -> None:
    args = arguments(__doc__, list(ROWS), 3)

    def one(bench: Bench, name: str, seed: int) -> dict[str, Any]:
        return bench.run(Row(32), seed, lambda model: change(model, *ROWS[name]))

    bench, results, commit = measured(args, "integer", one, report)
    if not results.find(table="variance"):
        found = gradients(bench, 0)
        for bits in (8, 6, 4):
            for groups in range(1, Precision(bits).most + 1):
                precision = Precision(bits, groups)
                for method, shared in (("one scale", True), ("a scale for each row", False)):
                    key = {
                        "table": "variance",
                        "scheme": f"{bits} bit, {groups}",
                        "method": method,
                        "seed": 0,
                    }
                    results.add({**key, "commit": commit, "ratio": variances(found, precision, shared)})
    report(tables.integer(results.document))
    report(tables.variance(results.document))
    refresh(args.write)


if __name__ == "__main__":
    main()
