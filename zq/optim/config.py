"""How optimizer states are stored: a format and a layout of scales for each, as one string (zq/spec.py).

    exp_avg: dynamic4:b128       # first moment (SGD: momentum_buffer): a signed format
    exp_avg_sq: ulinear4:rank1   # second moment; "factored": the outer product of row and column means
    scale: absmax                # absmax-signed: the scale carries the sign of the largest magnitude
    rounding: nearest            # stochastic: seeded by `seed`, parameter and step
    seed: 0
    keep_sign: false             # true: a negative value never becomes zero, as in bitsandbytes' kernels
    threshold: 4096              # tensors of at most so many elements stay in 32 bits

"float32" as a format keeps a state in 32 bits. Layouts: bN flat blocks, tensor, rank1 (of vectors: b128).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from zq.errors import ZqError
from zq.spec import TensorSpec
from zq.strict_yaml import read

FLOAT, FACTORED = "float32", "factored"
EXAMPLE = "states of an optimizer are a mapping, such as 'exp_avg_sq: ulinear4:rank1'; see docs/optim.md"
BITS = (32, 8, 4)


@dataclass(frozen=True, kw_only=True)
class States:
    """See the module docstring. Defaults are those of `bits=32`."""

    exp_avg: str = FLOAT
    exp_avg_sq: str = FLOAT
    momentum_buffer: str = FLOAT
    scale: str = "absmax"
    rounding: str = "nearest"
    keep_sign: bool = False
    threshold: int = 4096
    seed: int = 0


DEFAULTS = {
    32: States(),
    8: States(exp_avg="dynamic8:b256", exp_avg_sq="udynamic8:b256", momentum_buffer="dynamic8:b256"),
    4: States(exp_avg="dynamic4:b128", exp_avg_sq="ulinear4:rank1", momentum_buffer="dynamic4:b128"),
}
ALLOWED = {"scale": ("absmax", "absmax-signed"), "rounding": ("nearest", "stochastic")}
NAMES = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def states(bits: Any, given: Mapping[str, Any] | str | Path | None, names: tuple[str, ...]) -> States:
    """The defaults of `bits`, with what `given` (a mapping or a YAML file) says instead; `names` are the
    states of the optimizer. Raises ZqError for an unknown key, a wrong type, or a spec that no state can
    have."""
    if type(bits) is not int or bits not in BITS:
        raise ZqError(f"bits={bits!r} is not allowed; allowed: 32, 8, 4")
    if given is None:
        return DEFAULTS[bits]
    where = str(given) if isinstance(given, (str, Path)) else "states"
    if isinstance(given, (str, Path)):
        given = _read(Path(given), where)
    if not isinstance(given, Mapping):
        raise ZqError(f"states={given!r} is no mapping; give one such as {{'exp_avg_sq': 'ulinear4:rank1'}}")
    if bits == 32 and any(key in NAMES for key in given):
        raise ZqError(f"{where}: with bits=32 states are float32; give bits=8 or bits=4")
    types = {f.name: f.default for f in fields(States) if f.name not in NAMES or f.name in names}
    for key, value in given.items():
        if key not in types:
            raise ZqError(f"{where}: key '{key}' is unknown; allowed: {', '.join(types)}")
        if type(value) is not type(types[key]):
            raise ZqError(f"{where}: '{key}' must be {type(types[key]).__name__}, not {value!r}")
        if key in ALLOWED and value not in ALLOWED[key]:
            raise ZqError(f"{where}: '{key}: {value}' is not allowed; allowed: {', '.join(ALLOWED[key])}")
        if key in NAMES:
            _check(key, value, where)
    found = replace(DEFAULTS[bits], **given)
    if found.keep_sign and found.scale == "absmax-signed":
        raise ZqError(f"{where}: 'keep_sign' goes with 'scale: absmax' only; drop one")
    return found


def _read(path: Path, where: str) -> Mapping[str, Any]:
    try:
        return read(path.read_text(encoding="utf-8"), where, EXAMPLE)
    except (OSError, UnicodeDecodeError):
        raise ZqError(f"cannot read {where}; give a readable YAML file or a mapping") from None


def checked(spec: Any, where: str) -> str:
    """The spec of a saved state, if a state can have it. Raises ZqError."""
    if spec == FACTORED:
        return spec
    try:
        if isinstance(spec, str):
            _check("exp_avg_sq", spec, where)
            return spec
    except ZqError:
        pass
    raise ZqError(f"{where} has spec {spec!r}, which no state can have; load another file")


def _check(key: str, value: str, where: str) -> None:
    if value == FLOAT or (value == FACTORED and key == "exp_avg_sq"):
        return
    spec = TensorSpec.parse(value)
    plain = spec == TensorSpec(format=spec.format, layout=spec.layout, scale_dtype=spec.scale_dtype)
    if not plain or spec.layout.kind not in ("block", "tensor", "rank1") or spec.info.is_estimated:
        raise ZqError(
            f"{where}: '{key}: {value}' cannot hold a state; allowed: a format that is not estimated from "
            "data, with layout bN, tensor or rank1"
        )
    if key != "exp_avg_sq" and not spec.info.signed:
        raise ZqError(
            f"{where}: '{key}: {value}' has no negative values; take a signed format such as dynamic8"
        )
