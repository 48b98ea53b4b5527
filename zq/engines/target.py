"""Where a checkpoint is to run, as text and as data.

vllm:0.33:sm90:tp=4      engine[:version][:device][:tp=N], device smNN or cpu
vllm:zq                  vLLM with zq installed beside it, so with zq's plug-in (zq/plugins/vllm.py)
sglang, transformers, sentence-transformers, llama.cpp
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from zq.errors import ZqError

VERSIONS = {
    "vllm": "0.33",
    "sglang": "0.5",
    "transformers": "5",
    "sentence-transformers": "6",
    "llama.cpp": "",
}
HUB = ("compressed-tensors", "gptq", "awq", "fp8")
READS = {  # formats, the first to be advised before the others; zq's in vLLM with the plug-in only
    "vllm": HUB,
    "sglang": HUB,
    "transformers": (*HUB, "zq"),
    "sentence-transformers": (*HUB, "zq"),
    "llama.cpp": ("gguf",),
}
NAMES = {"version": "version", "sm": "device", "tp": "number of devices", "plugin": "plug-in"}
EXAMPLES = {
    "vllm": "vllm:0.33:sm90:tp=2, or vllm:zq with zq beside vLLM",
    "sglang": "sglang:0.5:sm90:tp=2",
    "transformers": "transformers:5.24",
    "sentence-transformers": "sentence-transformers:6.2",
    "llama.cpp": "llama.cpp, which has no versions that zq tells apart",
}
DEVICES = (70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 110, 120, 121)  # compute capabilities times ten
SERVERS = ("vllm", "sglang")  # they fuse layers, and split them between devices


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a checkpoint is to run. `sm` is the compute capability times ten; 0: a CPU. `plugin`: zq's."""

    engine: str
    version: str
    sm: int = 90
    tp: int = 1
    plugin: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Formats of checkpoints."""
        return (*READS[self.engine], *["zq"] * self.plugin)

    def __str__(self) -> str:
        device = f"sm{self.sm}" if self.sm else "cpu"
        parts = [self.engine, self.version] if self.version else [self.engine]
        if self.engine in SERVERS:
            parts += [device] + [f"tp={self.tp}"] * (self.tp > 1) + ["zq"] * self.plugin
        return ":".join(parts)


def parse(text: str) -> Target:
    """Raises ZqError naming the part that is wrong."""
    engine, *rest = text.split(":")
    if engine not in VERSIONS:
        raise ZqError(f"engine '{engine}' in '{text}' is unknown; allowed: {', '.join(VERSIONS)}")
    said: dict[str, Any] = {}
    for part in rest:
        found = _part(part, engine)
        if found is None:
            form = "ENGINE[:VERSION][:smNN or cpu][:tp=N]" if engine in SERVERS else f"{engine}[:VERSION]"
            raise ZqError(f"'{part}' in '{text}' is unknown; write {form}, for example {EXAMPLES[engine]}")
        if found[0] == "sm" and found[1] not in (0, *DEVICES):
            known = ", ".join(f"sm{sm}" for sm in DEVICES)
            raise ZqError(f"'{part}' in '{text}' is no device that zq knows; allowed: cpu, {known}")
        if found[0] in said:
            raise ZqError(f"'{part}' in '{text}' says the {NAMES[found[0]]} a second time; leave one out")
        said[found[0]] = found[1]
    return Target(engine=engine, **{"version": VERSIONS[engine], **said})


def _part(part: str, engine: str) -> tuple[str, Any] | None:
    """(field of Target, its value) that a part of a target's text gives; None when it is none."""
    if re.fullmatch(r"\d+(\.\d+)*", part):
        return "version", part
    if engine not in SERVERS:
        return None
    if found := re.fullmatch(r"sm_?(\d{2,3})a?", part):
        return "sm", int(found[1])
    if part == "cpu":
        return "sm", 0
    if found := re.fullmatch(r"tp=([1-9]\d{0,2})", part):
        return "tp", int(found[1])
    return ("plugin", True) if part == "zq" and engine == "vllm" else None
