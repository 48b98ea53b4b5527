"""The compile units of the matrix kernels: one for each scheme, for Hopper and for all others."""

from __future__ import annotations

from zq.kernels.layout import Packing
from zq.kernels.tiles import KINDS, packing, tiles, unit_name
from zq.kernels.unit import ARCHS, Unit

PORTABLE = tuple(arch for arch in ARCHS if arch != "sm_90a")


def _schemes() -> list[tuple[str, Packing]]:
    plain = [(op, 0) for op in KINDS if op not in ("w4a8_int8", "w4a8_fp8")]
    plain += [("w4a8_int8", g) for g in (64, 128)]
    plain += [(op, g) for op in ("w4a8_int8_group", "w4a8_fp8", "w4a16") for g in (32, 64, 128)]
    found = [(op, packing(op, group)) for op, group in plain]
    found += [(op, packing(op, group, half=True)) for op, group in plain if op.endswith("a16")]
    found += [("w4a16", packing("w4a16", g, True, half)) for g in (32, 64, 128) for half in (False, True)]
    return found


def _unit(op: str, p: Packing, arch: int) -> Unit:
    archs = ("sm_90a",) if arch == 90 else PORTABLE[1:] if "fp8" in op else PORTABLE
    return Unit(
        name=unit_name(op, p, arch),
        source="gemm_sm90.cu" if arch == 90 else "gemm_mma.cu",
        entries=tuple(tile.entry for tile in tiles(op, p, arch)),
        ops=(op,),
        archs=archs,
        defines=macros(op, p),
    )


def macros(op: str, p: Packing) -> tuple[tuple[str, str], ...]:
    """What scheme.cuh wants to know."""
    kind = "KIND_" + (op if p.kind == "w8a8" else p.kind)
    numbers = {"ZQ_GROUP": p.group, "ZQ_ASYM": int(p.asym), "ZQ_HALF": int(p.half)}
    return (("ZQ_KIND", kind.upper()), *((name, str(value)) for name, value in numbers.items()))


GEMM_UNITS = tuple(_unit(op, p, arch) for arch in (90, 0) for op, p in _schemes())

# Not for any operator: how fast the tensor core of an sm_90a is, for benchmarks.
CEILINGS = tuple(
    Unit(
        name=f"ceiling_{op}",
        source="bench_ceiling.cu",
        entries=("n128", "n256"),
        ops=(),
        archs=("sm_90a",),
        defines=macros(op, packing(op, group)),
    )
    for op, group in (("w4a8_int8", 128), ("w8a8_int8", 0), ("w8a8_fp8", 0))
)
