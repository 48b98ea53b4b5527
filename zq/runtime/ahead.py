"""Greedy search and sampling whose host is a step ahead of the device.

What stops a sequence is known on the device. Its flags are copied on the way, and read when the next step is
already launched, so that the device never waits for the host. Where all sequences turn out to have stopped,
that step was in vain: it has written one more position of a cache that nobody keeps, and nothing else was
made of it, neither a token nor a random number. At the full length the host knows by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, MaxLengthCriteria

GIVEN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
UNUSED = {"tokenizer", "assistant_tokenizer"}  # of the stopping criteria, which have it
OVERRIDDEN = ("prepare_inputs_for_generation", "_prefill", "_update_model_kwargs_for_generation")


class Mail:
    """Values of the device on their way to the host, which goes on meanwhile."""

    def __init__(self, *like: Tensor) -> None:
        self.stream = torch.cuda.current_stream(like[0].device) if like[0].is_cuda else None
        self.event = None if self.stream is None else torch.cuda.Event()
        pinned = self.event is not None
        self.boxes = [torch.empty_like(x, device="cpu", pin_memory=pinned) for x in like]

    def send(self, *values: Tensor) -> None:
        """As many as there are, in the shapes and dtypes that were announced."""
        for box, value in zip(self.boxes, values, strict=True):
            box.copy_(value, non_blocking=True)
        if self.event is not None:
            self.event.record(self.stream)

    def read(self) -> list[Tensor]:
        """What was sent the last time, when it is there; overwritten by the next."""
        if self.event is not None:
            self.event.synchronize()
        return self.boxes


def fits(model: Any, ids: Tensor, criteria: Any, config: Any, given: dict[str, Any]) -> bool:
    """Whether a call is one that `sample` can make: on an empty cache of the runner's own that nobody gets to
    see, with steps of which nothing but tokens is asked. given: what else `_sample` of transformers got."""
    runner = model.zq_runner
    names = {name for name, value in given.items() if value is not None} - UNUSED
    cache, positions = given.get(runner.cache_name), given.get("position_ids")
    pads = any(hasattr(each, "eos_token_id") for each in criteria)
    return (
        runner.on
        and cache is not None
        and runner.run is not None
        and runner.run.ours() is cache
        and names <= {*GIVEN, runner.cache_name}
        and (positions is None or positions.dim() == 2)
        and ids.device == model.device
        and getattr(criteria, "max_length", None) is not None
        and not config.return_dict_in_generate
        and getattr(config, "prefill_chunk_size", None) is None
        and getattr(config, "compile_config", None) is None
        and (not pads or getattr(config, "_pad_token_tensor", None) is not None)
        and any(type(each) is MaxLengthCriteria for each in criteria)
        and all(_inherited(model, x) for x in OVERRIDDEN)
    )


def sample(
    model: Any, ids: Tensor, processors: Any, criteria: Any, config: Any, streamer: Any, given: dict[str, Any]
) -> Tensor:
    """The prompts and what follows, int64 [B, T]: what `_sample` of transformers returns where `fits`, with
    the same calls of processors, criteria and streamer.

    ids: prompts [B, S]; processors, criteria: transformers' lists; config: a GenerationConfig.
    """
    given = {name: value for name, value in given.items() if name not in UNUSED}
    inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=True, **given)
    logits = model(**inputs, return_dict=True).logits
    following = Following(model, given)
    pad = next((config._pad_token_tensor for each in criteria if hasattr(each, "eos_token_id")), None)
    asked: list[Any] = [each for each in criteria if type(each) is not MaxLengthCriteria or _reminds(each)]
    limit = min(each.max_length for each in criteria if type(each) is MaxLengthCriteria)
    stopped = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    mail = Mail(stopped) if streamer is None else Mail(stopped, ids[:, 0])
    try:
        while True:
            scores = processors(ids, logits[:, -1].to(torch.float32, copy=True))
            if config.do_sample:
                tokens = torch.multinomial(scores.softmax(-1), 1).squeeze(1)
            else:
                tokens = scores.argmax(-1)
            if pad is not None:
                tokens = torch.where(stopped, pad, tokens)
            ids = torch.cat((ids, tokens[:, None]), 1)
            for each in asked:
                stopped = (stopped | each(ids, None)).bool()
            mail.send(*(stopped, tokens)[: len(mail.boxes)])
            full = ids.shape[1] >= limit
            if not full:
                logits = following(tokens[:, None])
            flags, *texts = mail.read()
            if streamer is not None:
                streamer.put(texts[0].clone())
            if full or bool(flags.all()):
                break
    finally:
        if mail.event is not None:  # a step may still run
            mail.event.record(mail.stream)
            model.zq_runner.caches.written = mail.event
    if streamer is not None:
        streamer.end()
    return ids


class Following:
    """The steps behind a prompt: logits [B, 1, V] of the tokens int64 [B, 1] that it is given."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.model, self.run = model, model.zq_runner.run
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        grown = None if mask is None else torch.nn.functional.pad(mask, (0, 1), value=1)
        mask = self.run.announce(grown, given[model.zq_runner.cache_name])
        self.given = {**given, "attention_mask": mask, "return_dict": True}
        self.positions = None if positions is None else positions[:, -1:]

    def __call__(self, tokens: Tensor) -> Tensor:
        if self.positions is not None:
            self.positions = self.given["position_ids"] = self.positions + 1
        self.model.zq_runner.run = self.run  # another call may have been made in between
        self.run.announced = True
        return self.model(input_ids=tokens, **self.given).logits


def _reminds(criterion: Any) -> bool:
    """Whether a MaxLengthCriteria has something to say on the way: that a model has not so many positions."""
    places = getattr(criterion, "max_position_embeddings", None)
    return places is not None and criterion.max_length > places


def _inherited(model: Any, name: str) -> bool:
    """Whether a method of a model is GenerationMixin's, on its class and on itself."""
    return getattr(getattr(model, name, None), "__func__", None) is getattr(GenerationMixin, name, None)
