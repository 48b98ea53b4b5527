"""CUDA graphs of a model: decode steps over a static cache, and encoders of fixed shape.

A shape is run eagerly when it is first seen, which loads and warms everything up, captured when it comes
again (an encoder's after some calls: capturing takes longer than they do), and replayed from then on.
So do prompts over an empty static cache, and texts without a cache. Whatever is unusual about a call runs as
transformers runs it. The captured graphs, at most `LIMIT` of prompts, of texts and of others, share one
memory pool: they are never replayed at the same time, and what they return is copied.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from zq.errors import ZqError
from zq.runtime.cache import cache_name
from zq.runtime.captured import Captured, Place
from zq.runtime.pool import CachePool
from zq.runtime.prompt import PromptBuffers, is_fresh, prompt_step
from zq.runtime.step import Buffers, first_seen, given_dtype, is_static, static_step
from zq.runtime.text import TextBuffers, TextMemory, dynamic_cache

LIMIT = 16
PATIENCE = 4  # calls of an encoder in a shape before it is captured
PROMPTS = 2  # calls of a decoder with a prompt of a shape before it is captured
LONG = 2**24  # tokens times hidden channels of a prompt, up to which the memory of its graph is worth it
MANY = 2**25  # logits that the graph of a text returns, at most
MASKED = ("sdpa", "eager")  # implementations of attention that take masks of four dimensions
DECODE = {"attention_mask", "position_ids", "use_cache", "return_dict", "logits_to_keep"}
ENCODE = {"attention_mask", "token_type_ids", "position_ids", "return_dict"}


class Run:
    """What is known of a call of generate() after its first step: its mask then only grows by ones, so it is
    padded with them once [B, L], and what `first_seen` has found stays so, and with it the graph.

    ours: the cache that was made for it, which nobody else has yet."""

    def __init__(self) -> None:
        self.cache: Any = lambda: None  # a weak reference, as is:
        self.ours: Any = lambda: None
        self.mask: Tensor | None = None
        self.width = 0
        self.announced = self.asked = False
        self.first: Tensor | None = None
        self.known: tuple[Captured, Tensor | None] | None = None

    def announce(self, mask: Tensor | None, cache: Any) -> Tensor | None:
        """A step of generate() follows, with this mask [B, width]: the one to be used for it."""
        width = 0 if mask is None else mask.shape[1]
        grown = self.mask is None if mask is None else self.mask is not None and width == self.width + 1
        if not grown or self.cache() is not cache:
            missing = max(cache.layers[0].max_cache_len - width, 0)
            self.mask = None if mask is None else torch.nn.functional.pad(mask, (0, missing), value=1)
            self.cache, self.asked, self.known = weakref.ref(cache), False, None
        self.width, self.announced = width, True
        return self.mask

    def expects(self, mask: Tensor | None, cache: Any) -> bool:
        """Whether this is the step that was announced."""
        announced, self.announced = self.announced, False
        return announced and mask is self.mask and self.cache() is cache

    def ask(self, cache: Any, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
        """`first_seen`, once."""
        if not self.asked:
            self.first, self.asked = first_seen(cache, mask, positions), True
        return self.first


class Runner:
    """Decides how a call of a model is run.

    blocks: of the model, fused or not; shared: what the fused ones have in common.
    on: whether static steps are made at all; capture: whether they are captured. Both are so on CUDA.
    takes: names of the parameters of the model's forward. kv: what caches of generate() hold (int8, fp8),
    None: 16 bits.
    """

    def __init__(
        self,
        config: Any,
        shared: Any,
        blocks: list[Any],
        encoder: bool,
        takes: frozenset[str],
        on: bool,
        kv: str | None = None,
    ) -> None:
        self.config, self.shared, self.blocks = config, shared, blocks
        self.encoder, self.takes = encoder, takes
        self.on = self.capture = on
        self.kv = kv
        self.cache_name = cache_name(takes)
        self.run: Run | None = None
        self.caches = CachePool(config)
        self.seen: OrderedDict[Hashable, Captured] = OrderedDict()
        self.prompts: OrderedDict[Hashable, Captured] = OrderedDict()  # whose lengths vary more than steps do
        self.texts: OrderedDict[Hashable, Captured] = OrderedDict()
        self.memory = TextMemory(config)
        self.place: Place | None = None
        self.lock = threading.RLock()  # what is shared holds one call at a time

    def __deepcopy__(self, memo: dict[int, Any]) -> Runner:
        """A copy of the model captures graphs of its own."""
        config, shared, blocks = (copy.deepcopy(x, memo) for x in (self.config, self.shared, self.blocks))
        return Runner(config, shared, blocks, self.encoder, self.takes, self.on, self.kv)

    def forget(self) -> None:
        """Drop graphs, and the memory of caches and texts."""
        for each in (self.seen, self.prompts, self.texts, self.caches.held):
            each.clear()
        self.memory.flat = self.place = None

    def __call__(self, model: Any, forward: Callable[..., Any], args: tuple[Any, ...], given: Any) -> Any:
        if given.get("output_attentions") and self.shared.fused:
            raise ZqError("a fused model has no attention weights to return; load it without zq.optimize")
        if not self.on or torch.compiler.is_compiling() or torch.is_grad_enabled() or model.training:
            return forward(*args, **given)
        if len(args) == 1:
            args, given = (), {"input_ids": args[0], **given}
        rest = {name: value for name, value in given.items() if value is not None}
        if "past_key_values" in rest:  # its old name
            rest[self.cache_name] = rest.pop("past_key_values")
        ids = rest.pop("input_ids", None)
        if args or not torch.is_tensor(ids) or ids.dim() != 2 or _capturing(ids):
            return forward(*args, **given)
        if torch.is_autocast_enabled(ids.device.type):
            return forward(*args, **given)
        with self.lock:
            self.caches.settle(ids.device)
            if self._is_watched():
                made = None  # blocks leave a sum to the next one, and what is replayed is not seen
            elif self.encoder:
                made = self._encode(forward, ids, rest, model.dtype)
            elif self.cache_name not in rest:
                made = self._text(forward, ids, rest, model.dtype)
            else:
                made = (self._decode if ids.shape[1] == 1 else self._prompt)(forward, ids, rest)
            return forward(input_ids=ids, **rest) if made is None else made

    def _is_watched(self) -> bool:
        """Whether somebody wants to see the outputs of blocks. transformers' own hooks are for what a call
        asks for, and do nothing else."""
        both = [hooks for x in self.blocks for hooks in (x._forward_hooks, x._forward_pre_hooks) if hooks]
        theirs = (hook for hooks in both for hook in hooks.values())
        return getattr(self.config, "output_hidden_states", False) or any(
            not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in theirs
        )

    def _decode(self, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any]) -> Any:
        cache: Any = rest.get(self.cache_name)
        mask, positions = rest.get("attention_mask"), rest.get("position_ids")
        keep = rest.get("logits_to_keep", 0)
        run = self.run if self.run is not None and self.run.expects(mask, cache) else None
        if not _ordinary(rest, {*DECODE, self.cache_name}) or not isinstance(keep, int):
            return None
        known = None if run is None else run.known
        if known is None:
            known = self._known(cache, ids, mask, positions, run)
            if known is None:
                return None
            if run is not None:
                run.known = known
        seen, first = known
        seen.buffers.fill(ids, positions, mask, first)

        def step() -> Any:
            options = {"logits_to_keep": keep, "position_ids": seen.buffers.positions, self.cache_name: cache}
            options = {name: value for name, value in options.items() if name in self.takes}
            out = static_step(forward, cache, seen.buffers, self.shared, options)
            # What is kept must not keep a cache alive.
            return type(out)(**{name: x for name, x in out.items() if name != self.cache_name})

        out = seen.run(step, self._place())
        out[self.cache_name] = cache
        return out

    def _known(
        self, cache: Any, ids: Tensor, mask: Tensor | None, positions: Tensor | None, run: Run | None
    ) -> tuple[Captured, Tensor | None] | None:
        """The steps that one over this cache belongs to, and what `first_seen` says if they are on zq's own
        attention; None: it is made without. run: the call of generate() whose step it is."""
        if not is_static(cache) or ("position_ids" in self.takes and positions is None):
            return None
        layers = cache.layers
        batch, length = layers[0].keys.shape[0], layers[0].keys.shape[2]
        if batch != ids.shape[0] or (mask is not None and (mask.dim() != 2 or mask.shape[1] > length)):
            return None
        shared, dtype, stored = self.shared, given_dtype(layers[0]), layers[0].keys.dtype
        fits = shared.around is not None and shared.around.fits(dtype, length)
        first = None
        if fits:
            first = first_seen(cache, mask, positions) if run is None else run.ask(cache, mask, positions)
        own = first is not None
        if not own and stored != dtype:
            return None
        places = tuple(x.data_ptr() for y in layers for x in (y.keys, y.values, y.cumulative_length))

        def make() -> Buffers:
            if own:
                return shared.around.buffers(batch, length, dtype, ids.device)
            return Buffers(batch, length, ids.device, own=False)

        return self._find(("decode", batch, length, stored, own, places), make), first

    def _prompt(self, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any]) -> Any:
        """A prompt over an empty static cache. Short ones, in which the host is what takes long, are captured
        when they come for the third time."""
        cache: Any = rest.get(self.cache_name)
        mask, positions = rest.get("attention_mask"), rest.get("position_ids")
        keep, around, (batch, count) = rest.get("logits_to_keep", 0), self.shared.around, ids.shape
        usual = _ordinary(rest, {*DECODE, self.cache_name}) and isinstance(keep, int)
        usual = usual and self.config._attn_implementation in MASKED
        if not usual or around is None or not is_static(cache):
            return None
        layer = cache.layers[0]
        if "position_ids" not in self.takes or positions is None or positions.shape[-1] != count:
            return None
        if (
            layer.keys.dtype != given_dtype(layer)
            or layer.keys.shape[0] != batch
            or layer.keys.shape[2] < count
        ):
            return None
        if mask is not None and (mask.dim() != 2 or mask.shape[0] != batch or mask.shape[1] < count):
            return None
        mask = None if mask is None else mask[:, :count]
        empty, whole = is_fresh(cache, mask) if around.takes_prompt(count) else (False, False)
        if not empty:
            return None
        given = (ids, positions, None if whole else mask)
        if self._is_long(ids):
            out = self._read(forward, PromptBuffers(*given), cache, keep)
        else:
            places = tuple(
                x.data_ptr() for y in cache.layers for x in (y.keys, y.values, y.cumulative_length)
            )
            key = ("prompt", batch, count, positions.shape[0], keep, whole, places)
            seen = self._find(key, lambda: PromptBuffers.like(*given), PROMPTS, self.prompts)
            seen.buffers.fill(*given)
            out = seen.run(lambda: self._read(forward, seen.buffers, cache, keep), self._place())
        out[self.cache_name] = cache
        return out

    def _read(self, forward: Callable[..., Any], buffers: PromptBuffers, cache: Any, keep: int) -> Any:
        """A prompt over an empty cache: the output without it, since what is kept must not keep a cache
        alive."""
        options = {"logits_to_keep": keep, self.cache_name: cache}
        options = {name: value for name, value in options.items() if name in self.takes}
        out = prompt_step(forward, cache, buffers, self.shared, options)
        return type(out)(**{name: x for name, x in out.items() if name != self.cache_name})

    def _text(
        self, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any], dtype: torch.dtype
    ) -> Any:
        """A text without a cache. Captured as prompts are."""
        mask, positions = rest.get("attention_mask"), rest.get("position_ids")
        cached = rest.get("use_cache", getattr(self.config, "use_cache", True))
        keep = rest.get("logits_to_keep", 0)
        around, count = self.shared.around, ids.shape[1]
        usual = _ordinary({**rest, "use_cache": True}, DECODE) and isinstance(keep, int)
        usual = usual and self.config._attn_implementation in MASKED
        if not usual or around is None or not {"position_ids", self.cache_name} <= self.takes:
            return None
        if not around.takes_prompt(count):
            return None
        # Without a mask, transformers looks in positions for several texts in a row.
        shaped = positions is None or (mask is not None and positions.shape[1:] == ids.shape[1:])
        if not shaped or (mask is not None and mask.shape != ids.shape) or not self.memory.grows:
            return None
        mask = None if mask is None or bool(mask.all()) else mask
        if positions is None:
            if mask is not None:  # from which some families take them
                return None
            positions = torch.arange(count, device=ids.device)[None]
        vocabulary = self.config.get_text_config(decoder=True).vocab_size
        long = self._is_long(ids) or ids.shape[0] * (keep or count) * vocabulary > MANY
        if long and not cached:  # then keys and values would be kept for nothing
            return None
        shape = self.memory.shape(*ids.shape)
        if long:
            both = torch.empty(shape, dtype=dtype, device=ids.device)
            buffers = TextBuffers(self.config, PromptBuffers(ids, positions, mask), both)
            out = self._read(forward, buffers, buffers.cache, keep)
        else:
            if not self.memory.holds(shape, dtype, ids.device):
                self.texts.clear()
                self.memory.make(shape, dtype, ids.device)
            both, like = self.memory.view(shape), PromptBuffers.like
            key = (*ids.shape, positions.shape[0], keep, mask is None)
            seen = self._find(
                key, lambda: TextBuffers(self.config, like(ids, positions, mask), both), PROMPTS, self.texts
            )
            buffers = seen.buffers
            buffers.fill(ids, positions, mask)
            out = seen.run(lambda: self._read(forward, buffers, buffers.cache, keep), self._place())
        if cached and self.cache_name in type(out).__dataclass_fields__:
            out[self.cache_name] = dynamic_cache(self.config, both if long else both.clone())
        return out

    def _is_long(self, ids: Tensor) -> bool:
        return ids.numel() * self.config.get_text_config(decoder=True).hidden_size > LONG

    def _encode(
        self, forward: Callable[..., Any], ids: Tensor, rest: dict[str, Any], dtype: torch.dtype
    ) -> Any:
        given = {"input_ids": ids, **{n: x for n, x in rest.items() if n != "return_dict"}}
        shaped = all(torch.is_tensor(x) and x.dim() == 2 for x in given.values())
        if not _ordinary(rest, ENCODE) or not shaped or self.config._attn_implementation != "sdpa":
            return None
        key = ("encode", *((name, tuple(x.shape), x.dtype) for name, x in sorted(given.items())))
        seen = self._find(key, lambda: {name: torch.empty_like(x) for name, x in given.items()}, PATIENCE)
        for name, value in given.items():
            seen.buffers[name].copy_(value)
        buffers, fused = seen.buffers, self.shared.config is not None

        def step() -> Any:
            # In four dimensions: else transformers would ask whether it is all ones, or make one where there
            # is none (5.17, while a graph is captured). Fused blocks take an empty one for none.
            inputs = dict(buffers)
            if "attention_mask" in inputs:
                hidden = inputs["attention_mask"].eq(0)[:, None, None, :]
                added = torch.zeros_like(hidden, dtype=dtype)
                inputs["attention_mask"] = added.masked_fill_(hidden, torch.finfo(dtype).min)
            else:
                shape = (0, 1, 1, 1) if fused else (ids.shape[0], 1, 1, ids.shape[1])
                inputs["attention_mask"] = torch.zeros(shape, dtype=dtype, device=ids.device)
            return forward(**inputs, return_dict=True)

        return seen.run(step, self._place())

    def _find(
        self,
        key: Hashable,
        make: Callable[[], Any],
        eager: int = 1,
        among: OrderedDict[Hashable, Captured] | None = None,
    ) -> Captured:
        among = self.seen if among is None else among
        found = among.pop(key, None)
        if found is None:
            with torch.inference_mode(False):  # else they could not be written outside of it
                found = Captured(make(), eager)
        among[key] = found
        while len(among) > LIMIT:
            among.popitem(last=False)
        return found

    def _place(self) -> Place | None:
        if self.capture and self.place is None:
            self.place = Place()
        return self.place if self.capture else None


def _ordinary(given: dict[str, Any], allowed: set[str]) -> bool:
    return given.keys() <= allowed and given.get("use_cache", True) and given.get("return_dict", True)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
