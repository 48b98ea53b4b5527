"""The compile units of optimizer steps: one for each way to keep the states."""

from __future__ import annotations

from zq.kernels.unit import Unit

KEPT: dict[int | str, str] = {32: "Full", 8: "Codes<8>", 4: "Codes<4>"}  # bits -> class of states.cuh
FACTORED = {"factored": "Factored"}  # the second state of AdamW only
ENTRIES = ("step", "maxima", "scales")


def unit_name(update: str, bits: tuple[int | str, ...]) -> str:
    """("adamw", (8, 32)) -> "adamw_8_32"; bits of each state, or "factored"."""
    return "_".join((update, *map(str, bits)))


def _unit(update: str, bits: tuple[int | str, ...]) -> Unit:
    first, second = (*((KEPT | FACTORED)[b] for b in bits), "None")[:2]
    return Unit(
        name=unit_name(update, bits),
        source="optim.cu",
        entries=ENTRIES,
        ops=(f"{update}_step",),
        defines=(("UPDATE", {"adamw": "AdamW", "sgd": "Sgd"}[update]), ("FIRST", first), ("SECOND", second)),
    )


OPTIM_UNITS = (
    *(_unit("adamw", (first, second)) for first in KEPT for second in (*KEPT, *FACTORED)),
    *(_unit("sgd", (bits,)) for bits in KEPT),
)
