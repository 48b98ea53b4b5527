"""The compile units of optimizer steps: one for each way to keep the states."""

from __future__ import annotations

from zq.kernels.unit import Unit

KEPT = {32: "Full", 8: "Codes<8>", 4: "Codes<4>"}  # bits of a state -> class of states.cuh
ENTRIES = ("step", "maxima", "scales")


def unit_name(update: str, bits: tuple[int, ...]) -> str:
    """("adamw", (8, 32)) -> "adamw_8_32"; bits of each state."""
    return "_".join((update, *map(str, bits)))


def _unit(update: str, bits: tuple[int, ...]) -> Unit:
    first, second = (*(KEPT[b] for b in bits), "None")[:2]
    return Unit(
        name=unit_name(update, bits),
        source="optim.cu",
        entries=ENTRIES,
        ops=(f"{update}_step",),
        defines=(("UPDATE", {"adamw": "AdamW", "sgd": "Sgd"}[update]), ("FIRST", first), ("SECOND", second)),
    )


OPTIM_UNITS = (
    *(_unit("adamw", (first, second)) for first in KEPT for second in KEPT),
    *(_unit("sgd", (bits,)) for bits in KEPT),
)
