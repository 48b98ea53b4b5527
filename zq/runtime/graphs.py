"""CUDA graphs of a model: decode steps over a static cache, and encoders of fixed shape.

A shape is run eagerly when it is first seen, which loads and warms everything up, captured the second time, and
replayed from then on. Whatever is unusual about a call runs as transformers runs it. The captured graphs, at
most `LIMIT`, share one memory pool: they are never replayed at the same time, and what they return is copied.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from zq.runtime.pool import CachePool
from zq.runtime.step import Buffers, is_static, static_step

LIMIT = 16
DECODE = ("past_key_values", "attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep")
ENCODE = ("attention_mask", "token_type_ids", "position_ids", "return_dict")


class Captured:
    """A call that was seen: its static buffers, and, from its second time on, its graph and what it returns."""

    def __init__(self, buffers: Any) -> None:
        self.buffers = buffers
        self.graph: Any = None
        self.out: Any = None
        self.calls = 0
        self.failed = False

    def run(self, step: Callable[[], Any], pool: Any, capture: bool) -> Any:
        """`step` reads the buffers and returns a ModelOutput whose tensors are then new ones."""
        self.calls += 1
        if not capture or self.failed or self.calls == 1:
            return step()
        if self.graph is None and not self._capture(step, pool):
            return step()
        self.graph.replay()
        kept = {name: x.clone() for name, x in self.out.items() if torch.is_tensor(x)}
        return type(self.out)(**{**self.out, **kept})

    def _capture(self, step: Callable[[], Any], pool: Any) -> bool:
        """Capturing runs nothing, so the caches are as before."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool):
                self.out = step()
        except RuntimeError as error:
            self.failed = True
            text = str(error).splitlines()[0]
            warnings.warn(f"zq: no CUDA graph for calls of this shape: {text}", stacklevel=2)
            return False
        self.graph = graph
        return True


class Runner:
    """Decides how a call of a model is run. on: whether static steps are made at all; capture: in graphs."""

    def __init__(self, model: Any, shared: Any, encoder: bool, on: bool) -> None:
        self.shared, self.encoder, self.on = shared, encoder, on
        self.capture = on
        self.caches = CachePool(model.config)
        self.seen: OrderedDict[Hashable, Captured] = OrderedDict()
        self.pool: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        raise NotImplementedError("an optimized model holds CUDA graphs and cannot be copied; load it again")

    def __call__(self, model: Any, forward: Callable[..., Any], args: tuple[Any, ...], given: Any) -> Any:
        if not self.on or torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
            return forward(*args, **given)
        if len(args) == 1:
            args, given = (), {"input_ids": args[0], **given}
        given = {name: value for name, value in given.items() if value is not None}
        ids = given.get("input_ids")
        if args or not torch.is_tensor(ids) or ids.dim() != 2 or _capturing(ids):
            return forward(*args, **given)
        rest = {name: value for name, value in given.items() if name != "input_ids"}
        run = self._encode if self.encoder else self._decode
        made = run(model, forward, ids, rest)
        return forward(input_ids=ids, **rest) if made is None else made

    def _decode(self, model: Any, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any]) -> Any:
        cache, mask, positions = (rest.get(name) for name in DECODE[:3])
        ordinary = rest.keys() <= set(DECODE) and rest.get("use_cache", True) and rest.get("return_dict", True)
        takes_positions = "position_ids" in model.zq_parameters
        if ids.shape[1] != 1 or not ordinary or not is_static(cache) or (positions is None and takes_positions):
            return None
        layers: Any = cache.layers
        batch, length = layers[0].keys.shape[0], layers[0].keys.shape[2]
        if batch != ids.shape[0] or (mask is not None and (mask.dim() != 2 or mask.shape[1] > length)):
            return None
        keep = rest.get("logits_to_keep", 0)
        if not isinstance(keep, int):
            return None
        places = tuple(x.data_ptr() for y in layers for x in (y.keys, y.values, y.cumulative_length))
        seen = self._find(("decode", batch, length, places), lambda: Buffers(batch, length, ids.device))
        seen.buffers.fill(ids, positions, mask)
        options: dict[str, Any] = {"logits_to_keep": keep} if "logits_to_keep" in model.zq_parameters else {}
        if takes_positions:
            options["position_ids"] = seen.buffers.positions
        buffers, shared = seen.buffers, self.shared
        out = seen.run(
            lambda: _without_cache(static_step(forward, cache, buffers, shared, options)),
            self._pool(),
            self.capture,
        )
        out["past_key_values"] = cache
        return out

    def _encode(self, model: Any, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any]) -> Any:
        given = {"input_ids": ids, **{n: x for n, x in rest.items() if n != "return_dict"}}
        shaped = all(torch.is_tensor(x) and x.dim() == 2 for x in given.values())
        sdpa = model.config._attn_implementation == "sdpa"
        if not rest.keys() <= set(ENCODE) or not shaped or not sdpa or not rest.get("return_dict", True):
            return None
        key = ("encode", *((name, tuple(x.shape), x.dtype) for name, x in sorted(given.items())))
        seen = self._find(key, lambda: {name: torch.empty_like(x) for name, x in given.items()})
        for name, value in given.items():
            seen.buffers[name].copy_(value)
        buffers = seen.buffers

        def step() -> Any:
            inputs = dict(buffers)
            if "attention_mask" in inputs:  # made here: transformers would ask the host whether it is all ones
                inputs["attention_mask"] = inputs["attention_mask"].bool()[:, None, None, :]
            return forward(**inputs, return_dict=True)

        return seen.run(step, self._pool(), self.capture)

    def _find(self, key: Hashable, make: Callable[[], Any]) -> Captured:
        found = self.seen.pop(key, None) or Captured(make())
        self.seen[key] = found
        while len(self.seen) > LIMIT:
            self.seen.popitem(last=False)
        return found

    def _pool(self) -> Any:
        if self.capture and self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        return self.pool


class Graphed:
    """Goes in front of the class of a model."""

    zq_runner: Runner

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, mode: Any, *more: Any
    ) -> Any:
        """Greedy search and sampling get a static cache where nobody asked for another one."""
        batch, length = more[0], more[1]
        usual = (
            self.zq_runner.on
            and str(getattr(mode, "value", mode)) in ("greedy_search", "sample")
            and generation_config.cache_implementation is None
            and generation_config.use_cache is not False
            and not generation_config.is_assistant
            and model_kwargs.get("past_key_values") is None
        )
        if usual:
            # generate has repeated the inputs for num_return_sequences only later
            rows = batch * max(1, generation_config.num_return_sequences or 1)
            cache = self.zq_runner.caches.lease(rows, length, self.device, self.dtype)  # type: ignore[attr-defined]
            if cache is not None:
                model_kwargs["past_key_values"] = cache
                return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, mode, *more
        )

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        """transformers compiles a model with a static cache; here its steps are captured as they are."""
        if self.zq_runner.on and generation_config.compile_config is None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    def create_masks_for_generate(
        self, config: Any, *, attention_mask: Any = None, past_key_values: Any = None, **more: Any
    ) -> Any:
        """With a static cache the mask stays [B, L], padded to the length of the cache: masks of four
        dimensions are made in the step."""
        from transformers.masking_utils import create_masks_for_generate

        flat = attention_mask is None or attention_mask.dim() == 2
        plain = past_key_values is not None and all(
            type(layer).__name__ == "StaticLayer" for layer in past_key_values.layers
        )
        if not (self.zq_runner.on and flat and plain):
            return create_masks_for_generate(
                config, attention_mask=attention_mask, past_key_values=past_key_values, **more
            )
        if attention_mask is None:
            return None
        missing = past_key_values.layers[0].max_cache_len - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, max(missing, 0)))


def attach(model: Any, shared: Any, *, encoder: bool) -> bool:
    """Let a model run through a `Runner`; on devices without CUDA it is there and off. Returns whether it is
    on."""
    from inspect import signature

    cls = type(model)
    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    original = cls.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        return self.zq_runner(self, lambda *a, **k: original(self, *a, **k), args, given)

    made = type(cls.__name__, (Graphed, cls), {**facts, "forward": forward})
    on = model.device.type == "cuda"
    model.zq_parameters = frozenset(signature(original).parameters)
    model.zq_runner = Runner(model, shared, encoder, on)
    model.__class__ = made
    return on


def _without_cache(out: Any) -> Any:
    """A graph is kept, and must not keep a cache alive."""
    return type(out)(**{name: value for name, value in out.items() if name != "past_key_values"})


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
