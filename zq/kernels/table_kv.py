"""The compile units of attention: for one new token, with the cache that it reads, and for whole texts."""

from __future__ import annotations

from zq.kernels.unit import ARCHS, Unit, arch_number

KINDS = ("bf16", "fp16")
CLUSTERS = 90  # devices from here on have clusters of blocks
CACHES = {None: ("Same", None), "int8": ("Int8Codes", "Int8"), "fp8": ("Fp8Codes", "E4m3")}
HEADS = (64, 96, 128, 256)  # channels of a head are padded to one of these
STORES = (64, 128, 256)  # the same of store_kv
PROMPTS = (64, 128)  # and of what it takes for several tokens of a row, without norms and codes
TEXTS = (64, 128)  # of attend_text
TEXT_OUT = {short: out for short, (_, out) in CACHES.items()}  # what its rows come out as


def kv_units(kind: str, kv: str | None) -> tuple[str, str, str]:
    """Names of the units that decode_attention, store_kv and attend_token need in a model of `kind` (bf16,
    fp16) with a cache of `kv` (int8, fp8, None: 16 bits): load them before a CUDA graph is captured."""
    cache = "" if kv is None else f"_{kv}"
    return f"attention{cache}_{kind}", f"store_kv{cache}_{kind}", f"token{cache}_{kind}"


def _units(kind: str, kv: str | None) -> tuple[Unit, ...]:
    attention, store, token = kv_units(kind, kv)
    cache, out = CACHES[kv]
    written = (("OUT", out),) if out else ()
    return (
        Unit(
            name=attention,
            source="attention.cu",
            entries=tuple(f"attention_{d}" for d in HEADS),
            ops=("decode_attention",),
            defines=(("IN", kind), ("CACHE", cache)),
        ),
        Unit(
            name=store,
            source="store_kv.cu",
            entries=(
                *(f"store_kv_{d}" for d in STORES),
                *(f"store_rows_{d}" for d in PROMPTS if kv is None),
            ),
            ops=("store_kv",),
            defines=(("IN", kind), *written),
        ),
        Unit(
            name=token,
            source="token.cu",
            entries=tuple(f"token_{d}" for d in HEADS),
            ops=("attend_token",),
            defines=(("IN", kind), ("CACHE", cache), *written),
        ),
    )


def text_unit(kind: str, out: str | None) -> str:
    """The unit of attend_text, or, where rows come out in INT8 or FP8, of attend_text_codes."""
    return f"text{'' if out is None else '_' + out}_{kind}"


def _text(kind: str, out: str | None) -> Unit:
    written = TEXT_OUT[out]
    return Unit(
        name=text_unit(kind, out),
        source="text.cu",
        entries=tuple(f"text_{d}" for d in TEXTS),
        ops=("attend_text" if out is None else "attend_text_codes",),
        archs=ARCHS if out is None else tuple(arch for arch in ARCHS if arch_number(arch) >= CLUSTERS),
        defines=(("IN", kind), *((("OUT", written),) if written else ())),
    )


KV_UNITS = (
    *(unit for kind in KINDS for kv in CACHES for unit in _units(kind, kv)),
    *(_text(kind, out) for kind in KINDS for out in TEXT_OUT),
)
