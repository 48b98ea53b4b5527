"""A compile unit: one CUDA source with its switches, which NVRTC turns into one cubin per architecture."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zq.errors import ZqError

# What a cubin is made for, and the devices that run it. A cubin runs on later minor versions of the same
# major one, those with a trailing `a` on exactly one.
DEVICES: dict[str, tuple[tuple[int, int], ...]] = {
    "sm_80": ((8, 0), (8, 6), (8, 7)),
    "sm_89": ((8, 9),),
    "sm_90a": ((9, 0),),
    "sm_100a": ((10, 0),),
    "sm_120": ((12, 0), (12, 1)),
}
ARCHS = tuple(DEVICES)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """name      unique, begins the name of the cubin
    source    file in zq/kernels/src
    entries   names of its extern "C" kernels
    ops       operators that it serves
    archs     architectures that it can be compiled for
    defines   preprocessor macros
    options   further options of NVRTC
    """

    name: str
    source: str
    entries: tuple[str, ...]
    ops: tuple[str, ...]
    archs: tuple[str, ...] = ARCHS
    defines: tuple[tuple[str, str], ...] = ()
    options: tuple[str, ...] = ()


def arch_number(arch: str) -> int:
    """ "sm_90a" -> 90"""
    return int(re.sub(r"\D", "", arch))


def arch_of(capability: tuple[int, int]) -> str:
    """The architecture whose cubins a device of this compute capability runs. Raises ZqError."""
    for arch, devices in DEVICES.items():
        if capability in devices:
            return arch
    known = ", ".join(f"{major}.{minor}" for devices in DEVICES.values() for major, minor in devices)
    raise ZqError(
        f"there are no kernels for compute capability {capability[0]}.{capability[1]}; supported are "
        f"{known}; compute without kernels"
    )


def parse_archs(text: str) -> tuple[str, ...]:
    """ "sm_80,sm_90a" -> ("sm_80", "sm_90a"); "all" -> every one. Raises ZqError for an unknown one."""
    wanted = ARCHS if text == "all" else tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for arch in wanted:
        if arch not in ARCHS:
            raise ZqError(
                f"architecture '{arch}' is unknown; allowed: {', '.join(ARCHS)}, separated by commas, or all"
            )
    return wanted
