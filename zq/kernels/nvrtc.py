"""CUDA C++ -> cubin with NVRTC: no toolkit, no headers, no host compiler, no GPU.

NVRTC is a library of 100 MB that every CUDA build of torch brings; on other machines it is the extra
`kernels`. It is loaded at the first call, never at import. What a cubin depends on is hashed by `key`: the
source, the headers that it includes, options, architecture, the version of NVRTC.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from zq.errors import ZqError
from zq.kernels.unit import Unit, arch_number

SOURCES = Path(__file__).parent / "src"
OPTIONS = (
    "-std=c++17",
    "-default-device",
    "--fmad=false",  # so that float results equal the references; kernels write fmaf() where they want it
)
INSTALL = "run: pip install 'zq[kernels]'"


class CompileError(ZqError):
    """NVRTC refused a source; `log` is all that it said."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Compiled:
    """A cubin and what the compiler said: with `verbose`, registers and spills of each kernel."""

    cubin: bytes
    log: str


@lru_cache
def texts(source: str) -> dict[str, str]:
    """The source and all headers that it includes, by name. Raises ZqError when one is missing."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            found[name] = (SOURCES / name).read_text(encoding="utf-8")
        except OSError as error:
            raise ZqError(
                f"kernel source {SOURCES / name} cannot be read ({error}); install zq again"
            ) from None
        waiting += re.findall(r'^\s*#include "([^"]+)"', found[name], re.MULTILINE)
    return dict(sorted(found.items()))


def options(unit: Unit, arch: str) -> list[str]:
    """The options that a unit is compiled with."""
    macros = [f"-D{name}={value}" for name, value in unit.defines]
    return [f"-arch={arch}", *OPTIONS, *unit.options, f"-DZQ_ARCH={arch_number(arch)}", *macros]


def key(unit: Unit, arch: str, version: str) -> str:
    """Hex digest of everything that a cubin depends on; `version` of NVRTC, as `version()` gives it."""
    parts = [unit.source, texts(unit.source), options(unit, arch), version]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def is_installed() -> bool:
    """Whether `compile_unit` can work here."""
    try:
        version()
    except ZqError:
        return False
    return True


def version() -> str:
    """ "13.0". Raises ZqError when NVRTC is not installed."""
    major, minor = _checked(_nvrtc().nvrtcVersion())
    return f"{major}.{minor}"


def compile_unit(unit: Unit, arch: str, *, verbose: bool = False) -> Compiled:
    """Compile for one architecture. Raises ZqError when the unit is not for it, CompileError with the log."""
    if arch not in unit.archs:
        raise ZqError(f"kernel {unit.name} is not for {arch}; it is for {', '.join(unit.archs)}")
    nvrtc = _nvrtc()
    files = texts(unit.source)
    headers = [name for name in files if name != unit.source]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            files[unit.source].encode(),
            unit.source.encode(),
            len(headers),
            [files[name].encode() for name in headers],
            [name.encode() for name in headers],
        )
    )
    try:
        asked = [option.encode() for option in options(unit, arch) + ["--ptxas-options=-v"] * verbose]
        status = nvrtc.nvrtcCompileProgram(program, len(asked), asked)[0]
        log = (
            _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            .decode(errors="replace")
            .rstrip("\0")
        )
        if int(status):
            first = next((line for line in log.splitlines() if "error" in line), log.strip() or status.name)
            raise CompileError(
                f"kernel {unit.name} does not compile for {arch} with NVRTC {version()}: {first.strip()}", log
            )
        return Compiled(_text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(size_of: Any, read: Any, program: Any) -> bytes:
    # Not bytes: the library writes into it, and Python shares short ones (an empty log is one byte long).
    buffer = bytearray(_checked(size_of(program)))
    _checked(read(program, buffer))
    return bytes(buffer)


def _checked(answer: tuple[Any, ...]) -> Any:
    """What a call of the library gave besides its status."""
    status, *rest = answer
    if int(status):
        raise ZqError(f"NVRTC failed: {status.name}; {INSTALL}")
    return rest[0] if len(rest) == 1 else rest


@lru_cache
def _nvrtc() -> Any:
    try:
        nvrtc = import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()  # the library itself is loaded here
    except (ImportError, RuntimeError) as error:  # the loader's own error is a RuntimeError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ZqError(
            f"kernels are compiled with NVRTC, which is not installed ({reason}); {INSTALL}"
        ) from None
    return nvrtc
