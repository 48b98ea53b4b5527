"""One measurement: a model, an engine and a batch in; milliseconds and bytes out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from zq.bench.clock import Memory, median, synchronize, timed
from zq.bench.trace import Trace, traced
from zq.runtime.cache import cache_argument

MODES = ("decode", "prefill", "encode")
WARM = 2  # runs before the clock starts: they compile, capture, and fill caches


@dataclass(frozen=True, kw_only=True)
class Task:
    """mode: decode (a prompt of `length` tokens, then `new` tokens), prefill (the prompt alone, with its
    cache) or encode (`length` tokens through an encoder). seconds: how long runs of one kind are repeated."""

    mode: str
    length: int
    new: int
    device: str
    seconds: float = 2.0
    profile: bool = False


@torch.no_grad()
def measure(model: Any, engine: str, task: Task, batch: int) -> dict[str, Any]:
    """Figures of a row: of decode "prefill_ms", "ms_per_token", "tokens_per_s"; of prefill "prefill_ms",
    "tokens_per_s"; of encode "ms_per_batch", "sequences_per_s". All have "memory" (see Memory), "warm_s" and
    "runs_ms". Prefill in decode is `generate` of one token, a token what each of `new` more adds to that."""
    draw = torch.Generator().manual_seed(batch)
    ids = torch.randint(4, model.config.vocab_size, (batch, task.length), generator=draw).to(task.device)
    memory = Memory(task.device)
    row = (_generate if task.mode == "decode" else _forward)(model, engine, task, ids)
    row["memory"] = memory.to_dict()
    return row


def tidy(model: Any) -> None:
    """Drop what a batch left: compiled code, graphs, caches of keys and values."""
    model.__dict__.pop("_compiled_call", None)
    runner = getattr(model, "zq_runner", None)
    if runner is not None:
        runner.forget()
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forward(model: Any, engine: str, task: Task, ids: Tensor) -> dict[str, Any]:
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task.mode == "prefill":
        takes = signature(model.forward).parameters
        given |= {
            name: value for name, value in (("use_cache", True), ("logits_to_keep", 1)) if name in takes
        }
    run = model
    if engine == "compiled":
        run = torch.compile(model, mode=_mode(task.device), dynamic=False)

    def call() -> Any:
        return run(**given)

    warm = _warm(call, task.device, 5)  # a graph of an encoder is captured in the fifth call
    runs = timed(call, task.device, task.seconds)
    ms, batch = median(runs), ids.shape[0]
    row = {"warm_s": warm, "runs_ms": _rounded(runs)}
    if task.mode == "encode":
        row |= {"ms_per_batch": ms, "sequences_per_s": 1e3 * batch / ms}
    else:
        row |= {"prefill_ms": ms, "tokens_per_s": 1e3 * batch * task.length / ms}
    return row | traced(call, task.profile, task.device)


def _generate(model: Any, engine: str, task: Task, ids: Tensor) -> dict[str, Any]:
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # no end of text, no penalties
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False}
    if engine == "compiled":
        given |= _static(model, task)

    def text(count: int, **more: Any) -> Any:
        cache = given.get(cache_argument(model))
        if cache is not None and cache.layers[0].is_initialized:
            cache.reset()
        return model.generate(**given, max_new_tokens=count, **more)

    warm = _warm(lambda: text(1 + task.new), task.device, WARM)
    whole = timed(lambda: text(1 + task.new), task.device, task.seconds)
    text(1)
    first = timed(lambda: text(1), task.device, task.seconds / 4)
    each, batch = (median(whole) - median(first)) / task.new, ids.shape[0]
    row: dict[str, Any] = {
        "warm_s": warm,
        "prefill_ms": median(first),
        "ms_per_token": each,
        "tokens_per_s": 1e3 * batch / each,
        "runs_ms": {"whole": _rounded(whole), "first": _rounded(first)},
    }
    if task.profile:
        trace = Trace(task.device)
        text(1 + task.new, logits_processor=[trace])
        row["profile"] = trace.summary()
    return row


def _static(model: Any, task: Task) -> dict[str, Any]:
    """Options of `generate` for compiled decode steps over one static cache, which lies at the same addresses
    in every run, so that graphs are captured once."""
    from transformers import CompileConfig, StaticCache

    cache = StaticCache(config=model.config, max_cache_len=task.length + task.new + 1)
    compiled = CompileConfig(mode=_mode(task.device), dynamic=False)
    compiled._compile_all_devices = True  # type: ignore[assignment]
    return {cache_argument(model): cache, "compile_config": compiled}


def _mode(device: str) -> str:
    """What torch.compile offers against launch overhead: CUDA graphs, where there are any."""
    return "reduce-overhead" if device.startswith("cuda") else "default"


def _warm(call: Callable[[], Any], device: str, times: int) -> float:
    begin = time.perf_counter()
    for _ in range(times):
        call()
    synchronize(device)
    return round(time.perf_counter() - begin, 2)


def _rounded(runs: list[float]) -> list[float]:
    return [round(ms, 4) for ms in runs]
