"""What a model of transformers does differently once it runs through a `Runner`."""

from __future__ import annotations

import weakref
from functools import wraps
from inspect import signature
from typing import Any

import torch
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate

from zq.runtime import ahead
from zq.runtime.cache import make_cache
from zq.runtime.graphs import Run, Runner
from zq.runtime.step import is_plain

MODES = ("greedy_search", "sample")


class Graphed:
    """Goes in front of the class of a model."""

    zq_runner: Runner

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: Any, mode: Any, *more: Any
    ) -> Any:
        """Greedy search and sampling get a static cache where nobody asked for another one."""
        batch, length, runner = more[0], more[1], self.zq_runner
        steps = str(getattr(mode, "value", mode)) in MODES
        run = runner.run = Run() if steps else None
        usual = (
            (runner.on or runner.kv is not None)
            and generation_config.cache_implementation is None
            and generation_config.use_cache is not False
            and not generation_config.is_assistant
            and model_kwargs.get(runner.cache_name) is None
        )
        if usual and run is not None:
            rows = batch * (generation_config.num_return_sequences or 1)
            given: Any = self
            cache: Any = runner.caches.lease(rows, length, given.device, given.dtype, runner.kv)
            if cache is not None:
                run.ours = weakref.ref(cache)
            elif runner.kv is not None:
                cache = make_cache(given.config, rows, length, given.dtype, runner.kv, given.device)
            if cache is not None:
                model_kwargs[runner.cache_name] = cache
                return None
        return super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, mode, *more
        )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **given: Any,
    ) -> Any:
        """Usual calls run a step ahead of the device."""
        usual: Any = super()._sample  # type: ignore[misc]
        call = (input_ids, logits_processor, stopping_criteria, generation_config)
        known = getattr(usual, "__func__", None) is getattr(GenerationMixin, "_sample", None)
        if (
            known
            and not synced_gpus
            and ahead.fits(self, input_ids, stopping_criteria, generation_config, given)
        ):
            return ahead.sample(self, *call, streamer, given)
        return usual(*call, synced_gpus=synced_gpus, streamer=streamer, **given)

    def _valid_auto_compile_criteria(self, model_kwargs: Any, generation_config: Any) -> bool:
        """transformers compiles a model with a static cache; here its steps are captured as they are."""
        if self.zq_runner.on and generation_config.compile_config is None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    def create_masks_for_generate(self, config: Any, *, attention_mask: Any = None, **more: Any) -> Any:
        """With a static cache the mask stays [B, L], padded to the length of the cache: masks of four
        dimensions are made in the step, if at all."""
        flat = attention_mask is None or attention_mask.dim() == 2
        runner = self.zq_runner
        held = more.get(runner.cache_name)
        layers = [] if held is None else held.layers
        if not (runner.on and flat and layers and all(map(is_plain, layers))):
            usual: Any = getattr(super(), "create_masks_for_generate", create_masks_for_generate)
            return usual(config=config, attention_mask=attention_mask, **more)
        if runner.run is not None and more["inputs_embeds"].shape[1] == 1:
            return runner.run.announce(attention_mask, held)
        if attention_mask is None:
            return None
        missing = layers[0].max_cache_len - attention_mask.shape[1]
        return torch.nn.functional.pad(attention_mask, (0, max(missing, 0)))


def attach(model: Any, shared: Any, blocks: list[Any], *, encoder: bool, kv: str | None = None) -> bool:
    """Let a model run through a `Runner`, which is off on devices without CUDA. blocks: of the model, fused
    or not; kv: what the caches of its generate() hold. Returns whether it is on."""
    cls = type(model)
    original = cls.forward

    @wraps(original)
    def forward(self: Any, *args: Any, **given: Any) -> Any:
        return self.zq_runner(self, lambda *a, **k: original(self, *a, **k), args, given)

    facts = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "forward": forward}
    on = model.device.type == "cuda"
    takes = frozenset(signature(original).parameters)
    model.zq_runner = Runner(model.config, shared, blocks, encoder, takes, on, kv)
    model.__class__ = type(cls.__name__, (Graphed, cls), facts)
    return on
