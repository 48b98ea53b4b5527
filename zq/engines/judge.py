"""The verdict on a checkpoint in an engine: what runs, what is not as it says, why it does not load."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from zq.engines.others import llama_cpp, sglang, transformers
from zq.engines.served import Heads, Layer, held, refuse_fused, refuse_split
from zq.engines.target import SERVERS, VERSIONS, Target
from zq.engines.vllm import vllm

LOOK = {
    "vllm": vllm,
    "sglang": sglang,
    "transformers": transformers,
    "sentence-transformers": transformers,
    "llama.cpp": llama_cpp,
}
UNKNOWN = Heads()


@dataclass
class Verdict:
    """kernels: what runs, by scheme; problems: why it does not load; warnings: what is not as it says."""

    target: Target
    kernels: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def judge(target: Target, format: str, layers: Sequence[Layer], heads: Heads = UNKNOWN) -> Verdict:
    """What this engine makes of these layers in a checkpoint of this format. Servers are asked about layers
    as they hold them: fused, and split between devices."""
    verdict = Verdict(target)
    known = VERSIONS[target.engine]
    if known and not f"{target.version}.".startswith(f"{known}."):
        verdict.warnings.append(
            f"what zq knows is {target.engine} {known}; {target.version} may choose other kernels"
        )
    server = target.engine in SERVERS
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
        verdict.problems += refuse_split(layers, target.tp, heads, format)
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
