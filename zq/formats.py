"""Number formats: finite sets of code values, each one row of `FORMATS`.

    intK                two's complement, K = 2..8
    eXmYfn              floats of OCP OFP8 and MX: bias 2^(X-1) - 1, finite only (e5m2: as IEEE)
    eXmYbnb             bitsandbytes' `create_fp8_map`: bias 2^(X-1), larger exponent fields, smaller values
    eXmYpaper           k-bit scaling laws (arXiv:2212.09720, appendix A): the same with bias 2^(X-1) + 1;
                        e2m1paper is what bitsandbytes' kernels call fp4, e3m0paper the paper's 4-bit Float
    dynamicK            dynamic exponent, signed (8-bit optimizers, arXiv:2110.02861)
    udynamicK           the same without a sign, for second moments
    dynamicKnz          without zero (4-bit optimizers, arXiv:2309.01507: DE-0); also udynamicKnz
    linearK, ulinearK   evenly spaced, without zero: linspace(-1, 1, 2^K); (i + 1) / 2^K
    nfK                 normal float (QLoRA, arXiv:2305.14314): quantiles of a normal distribution
    quantileK, kmeansK  estimated from the data (zq/numerics/estimate.py), stored beside the codes

K is 3 to 8 where nothing else is said. This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["int", "float", "dynamic", "linear", "normal", "quantile", "kmeans"]


@dataclass(frozen=True, kw_only=True)
class FormatInfo:
    """A set of code values of `bits` bits.

    Floats have a sign, `exponent` and `mantissa` bits and a `bias`; their name says the flavour. Of fn (after
    ml_dtypes: finite only, no infinities) e4m3fn keeps one NaN pattern per sign, the narrower ones have none;
    e5m2 is IEEE-like (infinities and NaNs). `descending`: a larger exponent field is a smaller value.
    `signed`: has negative values. `zero`: has the value 0 (k-means need not find it).
    """

    name: str
    bits: int
    kind: Kind
    exponent: int = 0
    mantissa: int = 0
    bias: int = 0
    top_reserved: Literal["none", "nan", "ieee"] = "none"
    descending: bool = False
    signed: bool = True
    zero: bool = True

    @property
    def is_int(self) -> bool:
        return self.kind == "int"

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_estimated(self) -> bool:
        """Whether the code values come from the data."""
        return self.kind in ("quantile", "kmeans")


WIDTHS = range(3, 9)


def _ocp() -> list[FormatInfo]:
    """OCP OFP8 1.0, OCP MX 1.0; the others follow the rules of MX."""
    rows = [
        FormatInfo(name="e4m3fn", bits=8, kind="float", exponent=4, mantissa=3, bias=7, top_reserved="nan"),
        FormatInfo(name="e5m2", bits=8, kind="float", exponent=5, mantissa=2, bias=15, top_reserved="ieee"),
    ]
    for e, m in ((3, 2), (2, 3), (2, 1), (3, 0), (2, 0), (2, 2), (3, 1), (3, 3), (4, 2)):
        bias = (1 << (e - 1)) - 1
        rows.append(
            FormatInfo(name=f"e{e}m{m}fn", bits=1 + e + m, kind="float", exponent=e, mantissa=m, bias=bias)
        )
    return rows


def _descending(flavour: str, extra: int) -> list[FormatInfo]:
    return [
        FormatInfo(
            name=f"e{e}m{k - 1 - e}{flavour}",
            bits=k,
            kind="float",
            exponent=e,
            mantissa=k - 1 - e,
            bias=(1 << (e - 1)) + extra,
            descending=True,
        )
        for k in WIDTHS
        for e in (2, 3, 4)
        if e < k
    ]


def _maps(k: int) -> list[FormatInfo]:
    return [
        FormatInfo(name=f"dynamic{k}", bits=k, kind="dynamic"),
        FormatInfo(name=f"dynamic{k}nz", bits=k, kind="dynamic", zero=False),
        FormatInfo(name=f"udynamic{k}", bits=k, kind="dynamic", signed=False),
        FormatInfo(name=f"udynamic{k}nz", bits=k, kind="dynamic", signed=False, zero=False),
        FormatInfo(name=f"linear{k}", bits=k, kind="linear", zero=False),
        FormatInfo(name=f"ulinear{k}", bits=k, kind="linear", signed=False, zero=False),
        FormatInfo(name=f"nf{k}", bits=k, kind="normal"),
        FormatInfo(name=f"quantile{k}", bits=k, kind="quantile"),
        FormatInfo(name=f"kmeans{k}", bits=k, kind="kmeans", zero=False),
    ]


FORMATS: dict[str, FormatInfo] = {
    f.name: f
    for f in (
        *(FormatInfo(name=f"int{k}", bits=k, kind="int") for k in range(2, 9)),
        *_ocp(),
        *_descending("bnb", 0),
        *_descending("paper", 1),
        *(row for k in WIDTHS for row in _maps(k)),
    )
}

# For messages: the names themselves would fill a page.
KNOWN = (
    "int2 to int8, e4m3fn, e5m2, e3m2fn, e2m3fn, e2m1fn, e3m0fn; nf4, dynamic4, linear4, quantile4, kmeans4, "
    "each from 3 to 8 bits, and the others in docs/formats.md"
)
