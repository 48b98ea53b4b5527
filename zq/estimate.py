"""What a run will take, before it runs: memory, disk and time.

Time is measured, not assumed: each distinct weight spec quantizes one random matrix with the recipe's
own steps on this device, behind a norm for the steps that fold scales; one matrix is read as a step on the
whole model makes it; and the calibration tokens are charged with the time of a matrix product of the same
number of operations.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from zq.plan import Plan
from zq.quantizers.method import Block, BlockLink, Layer, Needs
from zq.spec import Scheme

PROBE = (512, 1536)
NO_CALL: dict[str, Any] = {"args": (), "kwargs": {}}


def estimate(plan: Plan) -> dict[str, Any]:
    """bytes_before, bytes_after, bits_per_weight, memory (bytes), disk (bytes), seconds."""
    weights: dict[Scheme, int] = {}
    for layer in plan.layers:
        if layer.scheme:
            weights[layer.scheme] = weights.get(layer.scheme, 0) + math.prod(layer.shape)
    seconds = sum(count * _per_weight(plan, scheme) for scheme, count in weights.items())
    if plan.windows is not None:
        reading = any(Needs.INPUTS in method.needs(options) for method, options in plan.steps)
        passes = 2 + len(plan.skeleton.arch.sites) * reading  # both streams, and once to each site
        passes += len(plan.skeleton.arch.links) * _tries(plan) + _trained(plan)
        work = 2 * passes * plan.tokens * sum(math.prod(layer.shape) for layer in plan.layers)
        seconds += work * per_operation(plan)
    seconds += _per_folded(plan) * sum(plan.source(name).numel for name in plan.view.becomes)
    seconds += 3 * (plan.bytes_before + plan.bytes_after) / 1e9  # reading, hashing, writing, reading back
    return {
        "bytes_before": plan.bytes_before,
        "bytes_after": plan.bytes_after,
        "bits_per_weight": plan.bits_per_weight,
        "memory": plan.memory_estimate,
        "disk": plan.bytes_after + 4 * plan.stream_bytes,  # carried streams, old and new at once
        "seconds": round(seconds, 1),
    }


def _tries(plan: Plan) -> float:
    """Passes of all calibration tokens through a block for each link, to search for its scales."""
    searching = [options for method, options in plan.steps if Needs.LINKS in method.needs(options)]
    return sum(o.tries * min(1.0, o.windows / plan.samples) for o in searching)


def _trained(plan: Plan) -> float:
    """Passes of all calibration tokens through a block to learn on batches of them: one forward and about
    two back, through the blocks that are looked ahead to as well."""
    learning = [(method.ahead(o), o) for method, o in plan.steps if hasattr(o, "iterations")]
    return sum(3 * (1 + ahead) * o.iterations * o.batch / plan.samples for ahead, o in learning)


def _per_weight(plan: Plan, scheme: Scheme) -> float:
    module = nn.Linear(PROBE[1], PROBE[0], bias=False, dtype=plan.dtype, device=plan.skeleton.device)
    tokens = torch.randn(1, 64, PROBE[1], device=plan.skeleton.device).to(plan.dtype)
    norm = nn.RMSNorm(PROBE[1], dtype=plan.dtype, device=plan.skeleton.device)
    stored = {"weight": plan.dtype}
    channels = torch.arange(PROBE[1], device=plan.skeleton.device)
    with torch.no_grad():
        module.weight.normal_(generator=torch.Generator(device=plan.skeleton.device).manual_seed(0))
        best = math.inf
        for _ in range(2):  # the first call warms up
            layer = Layer("probe.1", "mlp", module, False, _on_probe(scheme))
            both = nn.Sequential(norm, module)
            block = Block("probe", both, [layer], plan.dtype, 0, [[layer]])
            block.inputs = block.teacher_inputs = [tokens, tokens]
            block.calls = [NO_CALL, NO_CALL]
            block.targets = block.forward(block.inputs)
            if any(Needs.TEACHER in method.needs(options) for method, options in plan.steps):
                block.teacher = copy.deepcopy(both)
            block.links = [BlockLink("probe.0", norm, None, True, False, (layer,), channels, stored)]
            begun = time.perf_counter()
            for method, options in plan.steps:  # learning is charged by its tokens
                learns = hasattr(options, "iterations")
                method.run(block, replace(options, iterations=0) if learns else options)
            if module.weight.is_cuda:
                torch.cuda.synchronize()
            best = min(best, time.perf_counter() - begun)
    return best / math.prod(PROBE)


def _on_probe(scheme: Scheme) -> Scheme:
    """The scheme with no more kept columns than half of those of the probe."""
    kept = min(scheme.weights.kept, PROBE[1] // 2)
    return replace(scheme, weights=replace(scheme.weights, kept=kept))


def _per_folded(plan: Plan) -> float:
    """Seconds per weight that a step on the whole model takes: its smallest matrix is timed."""
    matrices = [name for name in plan.view.becomes if len(plan.source(name).shape) == 2]
    if not matrices:
        return 0.0
    smallest = min(matrices, key=lambda name: plan.source(name).numel)
    begun = time.perf_counter()
    plan.view.read([plan.skeleton.key_of(smallest)])
    return (time.perf_counter() - begun) / plan.source(smallest).numel


def per_operation(plan: Plan) -> float:
    """Seconds per multiplication or addition of a matrix product in the plan's dtype, on its device."""
    a = torch.ones(512, 1024, dtype=plan.dtype, device=plan.skeleton.device)
    best = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        (a @ a.T).sum().item()
        best = min(best, time.perf_counter() - begun)
    return best / (2 * 512 * 512 * 1024)
