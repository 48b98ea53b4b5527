"""From transformers models to the plain functions that zq.eval measures, and from texts to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.eval.encoder import States
from zq.eval.perplexity import Logits
from zq.runtime.cache import cache_argument, check_kv, rounding_cache


def decoder_logits(model: Any, kv: str | None = None) -> Logits:
    """input_ids [B, L] -> logits [B, L, V] of a causal language model, on its device, no gradient.

    Sets the model to evaluation mode. No mask is passed: the windows hold no padding. kv: int8 or fp8, keys
    and values rounded as a cache of these rounds them, all else as without it. Raises ZqError for another kv.
    """
    model.eval()
    if kv is not None:
        check_kv(kv, model.config)

    def logits(input_ids: Tensor) -> Tensor:
        with torch.inference_mode():
            ids = input_ids.to(model.device)
            if kv is None:
                return model(input_ids=ids, use_cache=False).logits
            cache = rounding_cache(model.config, kv)
            return model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits

    return logits


def encoder_states(model: Any) -> States:
    """(input_ids, attention_mask) -> last hidden state [B, L, H] of an encoder, on its device."""
    model.eval()

    def states(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        with torch.inference_mode():
            out = model(
                input_ids=input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                output_hidden_states=True,
            )
        # A model with a head has no last_hidden_state, but the same tensor ends hidden_states.
        last = getattr(out, "last_hidden_state", None)
        return out.hidden_states[-1] if last is None else last

    return states


def encode_sentences(sentences: Sequence[str], tokenizer: Any, length: int = 128) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), int64 [N, L] each: padded to the longest, cut at `length` tokens,
    with the tokenizer's special tokens ([CLS], [SEP]), which an encoder was trained with."""
    if not sentences:
        raise ZqError("there are no sentences to compare the encoders on; give a text with some")
    out = tokenizer(list(sentences), padding=True, truncation=True, max_length=length, return_tensors="pt")
    return out["input_ids"], out["attention_mask"]


def split_sentences(text: str, count: int, shortest: int = 40, longest: int = 300) -> list[str]:
    """`count` sentences of `shortest`..`longest` characters, spread evenly over `text`, in order.

    A sentence here is what ends with a full stop followed by white space within one paragraph: good
    enough to compare two encoders, which see the same ones. Raises ZqError when there are too few.
    """
    found = [
        sentence.rstrip(".") + "."
        for paragraph in text.split("\n\n")
        for sentence in " ".join(paragraph.split()).split(". ")
        if shortest <= len(sentence) <= longest
    ]
    if len(found) < count:
        raise ZqError(
            f"the text has {len(found)} sentences of {shortest} to {longest} characters; {count} are "
            "needed: give a longer text or ask for fewer"
        )
    return [found[i * len(found) // count] for i in range(count)]
