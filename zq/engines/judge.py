"""The verdict on a checkpoint in an engine: what runs, what is not as it says, why it does not load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from zq.engines.others import llama_cpp, sglang, transformers
from zq.engines.served import Heads, Layer, held, refuse_fused, refuse_split
from zq.engines.target import SERVERS, VERSIONS, Target
from zq.engines.vllm import vllm
from zq.errors import ZqError

LOOK = {
    "vllm": vllm,
    "sglang": sglang,
    "transformers": transformers,
    "sentence-transformers": transformers,
    "llama.cpp": llama_cpp,
}
UNKNOWN = Heads()
DEVICES = (1, 2, 3, 4, 5, 6, 8, 16)
NAMES = {"zq": "zq's own format", "gguf": "GGUF"}
LAST = "take another scheme or engine"  # where nothing else is known to help
# The layers as another format holds them; raises ZqError where it cannot.
Restate = Callable[[str], Sequence[Layer]]


@dataclass
class Verdict:
    """kernels: what runs, by scheme; problems: why it does not load; warnings: what is not as it says;
    advice: what makes it load, or why another format does not, "" where zq knows nothing."""

    target: Target
    kernels: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    advice: str = ""

    @property
    def refusal(self) -> str:
        """The first problem and what to do, on one line."""
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        first = f"{self.problems[0]}{more}"
        if ";" in first:
            return f"{first}, or {self.advice}" if self.advice else first
        return f"{first}; {self.advice or LAST}"


def judge(
    target: Target,
    format: str,
    layers: Sequence[Layer],
    heads: Heads = UNKNOWN,
    restate: Restate | None = None,
    command: str = "",
) -> Verdict:
    """What this engine makes of these layers in a checkpoint of this format. Servers are asked about layers
    as they hold them: fused, and split between devices. With `restate`, other formats are tried where this
    one does not load; `command` is the one that would write them."""
    verdict = _verdict(target, format, layers, heads)
    if verdict.problems:
        found = _elsewhere(target, format, layers, heads)
        other, why = _other(target, format, heads, restate) if restate else ("", "")
        found += [" ".join(["use", *command.split(), "--to", other])] * bool(other)
        verdict.advice = ", or ".join(found) or why * (format not in target.reads)
    return verdict


def _elsewhere(target: Target, format: str, layers: Sequence[Layer], heads: Heads) -> list[str]:
    """Other numbers of devices, and zq's plug-in, where they have been tried and help."""

    def loads(where: Target) -> bool:
        return not _verdict(where, format, layers, heads).problems

    found = []
    if target.tp > 1:
        sizes = [str(n) for n in DEVICES if n != target.tp and loads(replace(target, tp=n))]
        found += [f"choose another tensor parallel size: {' or '.join(sizes)}"] * bool(sizes)
    if target.engine == "vllm" and not target.plugin and loads(replace(target, plugin=True)):
        found.append("install zq beside it (vllm:zq)")
    return found


def _other(target: Target, format: str, heads: Heads, restate: Restate) -> tuple[str, str]:
    """(the first other format in which the engine loads the same layers or "", why not the first of all)."""
    why = ""
    for other in target.reads:
        try:
            if other != format and not _verdict(target, other, restate(other), heads).problems:
                return other, ""
        except ZqError as error:
            why = str(error) if other == target.reads[0] else why
    return "", why


def _verdict(target: Target, format: str, layers: Sequence[Layer], heads: Heads) -> Verdict:
    verdict = Verdict(target)
    known = VERSIONS[target.engine]
    if known and not f"{target.version}.".startswith(f"{known}."):
        verdict.warnings.append(
            f"judged by what zq knows of {target.engine} {known}, the nearest version; {target.version} may "
            "choose other kernels"
        )
    if format not in target.reads:
        names = [NAMES.get(name, name) for name in (*target.reads, format)]
        verdict.problems.append(f"{target.engine} reads {', '.join(names[:-1])}, not {names[-1]}")
        return verdict
    server = target.engine in SERVERS
    verdict.problems = refuse_split(layers, target.tp, heads, format) if server else []
    kernels: dict[str, dict[str, list[Layer]]] = defaultdict(lambda: defaultdict(list))
    for layer in held(layers, target.tp, heads) if server else layers:
        if layer.scheme is None:
            continue
        kernel, problem, warning = LOOK[target.engine](target, format, layer.scheme, layer.shape)
        if problem:
            _add(verdict.problems, f"{layer.scheme}: {problem}")
        elif kernel:
            kernels[str(layer.scheme)][kernel].append(layer)
        if warning:
            _add(verdict.warnings, f"{layer.scheme}: {warning}")
    verdict.kernels = {scheme: _say(found) for scheme, found in kernels.items()}
    if server:
        verdict.problems += refuse_fused(layers)
        if target.plugin and format == "zq":
            verdict.problems += [
                f"'{layer.name}' is outside the blocks, and zq's vLLM plug-in serves linear layers in them"
                for layer in layers
                if layer.scheme is not None and layer.site is None
            ]
    return verdict


def _say(found: dict[str, list[Layer]]) -> str:
    """The kernel of most layers; where there are others, for which layers they are."""
    most, *others = sorted(found, key=lambda kernel: -len(found[kernel]))
    named = [f"{kernel} for {_where(found[kernel])}" for kernel in others]
    return "; ".join([most, *named])


def _where(layers: list[Layer]) -> str:
    first = f"'{layers[0].name}' {list(layers[0].shape)}"
    return f"{len(layers)} layers, first {first}" if len(layers) > 1 else first


def _add(lines: list[str], line: str) -> None:
    if line not in lines:
        lines.append(line)
