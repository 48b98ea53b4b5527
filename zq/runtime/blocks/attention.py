"""Attention of a block: heads out of one matrix, rotation, cache, scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zq.kernels.checks import HALVES, MULTIPLE
from zq.kernels.checks_kv import CHANNELS, TEXT_CHANNELS, TEXT_ROWS
from zq.kernels.cuda import describe
from zq.kernels.launch_kv import text_shape
from zq.runtime.prompt import Prompt
from zq.runtime.rows import Rows
from zq.runtime.step import Step

TEXT = 256  # tokens of a row, up to which zq's attention of texts is used: of more, torch's is faster
ROPES = {"": "none", "halves": "half", "pairs": "interleaved"}  # of zq.models.structure, of zq::store_kv


class Call(NamedTuple):
    """What transformers gives a block beside the hidden states."""

    batch: int
    length: int
    mask: Tensor | None
    cache: Any
    tables: tuple[Tensor, Tensor] | None
    positions: Tensor | None
    alibi: Tensor | None
    rows: Rows | None  # of the hidden states, where the block before has quantized them
    more: dict[str, Any]


class Shared:
    """What the blocks of a model have in common.

    turn    cosine and sine of the positions at hand, made by the first of them
    step    the step or the prompt that is being made (zq/runtime/step.py, prompt.py)
    fused   how many blocks are
    config  of the model, where all are
    handed  (what a block has returned, its rows for the next one)
    around  what lies around the blocks (blocks/around.py), where all are
    """

    def __init__(self) -> None:
        self.turn: tuple[Tensor, Tensor] | None = None
        self.step: Step | Prompt | None = None
        self.fused = 0
        self.config: Any = None
        self.handed: tuple[Tensor, Rows] | None = None
        self.around: Any = None


class Attention(nn.Module):
    """qkv [M, (queries + 2 keys) * width] -> rows [M, queries * width], which zq's own attention
    quantizes as the next product `takes` them.

    module: transformers' attention, without its linears: attention functions read its attributes.
    rope, per head norms: as in zq.models.structure.
    """

    def __init__(self, module: Any, config: Any, rope: str, width: int, queries: int, keys: int) -> None:
        super().__init__()
        self.module, self.config, self.rope = module, config, rope
        self.width, self.queries, self.keys = width, queries, keys
        self.layer_idx: int = getattr(module, "layer_idx", 0)
        self.scaling = float(getattr(module, "scaling", width**-0.5))
        self.head_norm: Tensor | None = None
        self.eps = 0.0
        self.first = False  # of the blocks that share `shared`
        self.shared = Shared()

    def norm_heads(self, queries: Any, keys: Any) -> None:
        """Norms [D] of query and key heads, as one weight [queries + keys, D]."""
        weights = [queries.weight.expand(self.queries, -1), keys.weight.expand(self.keys, -1)]
        self.head_norm = nn.Parameter(torch.cat(weights).detach(), requires_grad=False)
        self.eps = float(queries.variance_epsilon)

    @property
    def window(self) -> int | None:
        """Positions that a query sees at most; None: all."""
        return getattr(self.module, "sliding_window", getattr(self.config, "sliding_window", None))

    def fits(self, dtype: torch.dtype, length: int) -> bool:
        """Whether a step over `length` positions in `dtype` can use zq's own attention."""
        norm = self.head_norm is None or self.head_norm.dtype == dtype
        wide = self.width % MULTIPLE == 0 and self.width <= CHANNELS and self.queries % self.keys == 0
        return norm and wide and dtype in HALVES and (self.window is None or self.window >= length)

    def forward(self, qkv: Tensor, call: Call, takes: torch.dtype | None = None) -> Rows:
        step = self.shared.step
        if isinstance(step, Step) and step.own:
            return self._own(qkv, call, step, takes)
        prompt = step if isinstance(step, Prompt) and call.cache is step.cache else None
        rows = None if prompt is None else self._text(qkv, call, prompt, takes)
        return Rows(self._attended(qkv, call, step)) if rows is None else rows

    def gives(self, device: torch.device, takes: torch.dtype | None) -> tuple[torch.dtype | None, ...]:
        """What zq's attention of texts can make of a prompt whose keys and values go into the cache as they
        come out of the product: rows quantized as `takes` says, rows as they are (None); the best first.
        (Where `store_kv` has to be there, and in encoders, torch's attention and a launch for each of the
        rest are as fast.)"""
        bare = not self.rope and self.head_norm is None and self.width <= TEXT_CHANNELS
        wanted = dict.fromkeys((takes, None)) if bare else ()
        return tuple(x for x in wanted if text_fits(device, self, x is not None))

    def _text(self, qkv: Tensor, call: Call, prompt: Prompt, takes: torch.dtype | None) -> Rows | None:
        """The tokens of an empty cache in one launch; None: it is not to be."""
        usual = self.config._attn_implementation == "sdpa" and self._stores(qkv, call)
        ways = self.gives(qkv.device, takes) if usual else ()
        if not ways or call.length > TEXT or call.batch > TEXT_ROWS:
            return None
        heads = qkv.view(call.batch, call.length, -1, self.width)
        layer = prompt.layer(self.layer_idx)
        given = (
            *heads.split((self.queries, self.keys, self.keys), 2), prompt.hidden(qkv.dtype), layer.keys,
            layer.values, True, self.scaling,
        )  # fmt: skip
        if ways[0] is None:
            return Rows(torch.ops.zq.attend_text(*given))
        return Rows(*torch.ops.zq.attend_text_codes(*given, ways[0]))

    def _attended(self, qkv: Tensor, call: Call, step: Step | Prompt | None) -> Tensor:
        if isinstance(step, Prompt) and call.cache is step.cache and self._stores(qkv, call):
            return self._prompt(qkv, call, step)
        heads = qkv.view(call.batch, call.length, -1, self.width)
        both, v = heads.split((self.queries + self.keys, self.keys), 2)
        if self.head_norm is not None:
            both = self.head_norm * nn.functional.rms_norm(both, (self.width,), None, self.eps)
        if self.rope:
            both = self._rotated(both, call)
        q, k = both.split((self.queries, self.keys), 2)
        if isinstance(step, Step) and call.cache is step.cache:
            return self._one(q, k, v, call, step)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if isinstance(step, Prompt) and call.cache is step.cache:
            step.write(self.layer_idx, k, v)
            call = call._replace(mask=step.added(q.dtype))
        elif call.cache is not None:
            k, v = call.cache.update(k, v, self.layer_idx)
        return self._scores(q, k, v, call).reshape(call.batch * call.length, -1)

    def _own(self, qkv: Tensor, call: Call, step: Step, takes: torch.dtype | None) -> Rows:
        """A new token of each row through zq's operators, qkv [B, (queries + 2 keys) * width]."""
        layer, buffers = step.layer(self.layer_idx), step.buffers
        stored = (
            layer.keys,
            layer.values,
            getattr(layer, "key_scale", None),
            getattr(layer, "value_scale", None),
        )
        cos, sin = self._angles(call, step)
        given = cos, sin, self.queries, self.keys, ROPES[self.rope], *self._norms(), self.eps
        seen = buffers.first, buffers.last
        if takes is not None:
            made = torch.ops.zq.attend_token(qkv, *stored, *seen, *given, self.scaling, buffers.slopes, takes)
            return Rows(*made)
        q = torch.ops.zq.store_kv(qkv, *stored, buffers.last, *given)
        y = torch.ops.zq.decode_attention(q, *stored, *seen, self.scaling, buffers.slopes)
        return Rows(y.view(call.batch, -1))

    def _stores(self, qkv: Tensor, call: Call) -> bool:
        """Whether heads of a prompt are made by `store_kv`."""
        turned = not self.rope or (self.rope == "halves" and call.tables is not None)
        return turned and self.fits(qkv.dtype, call.length)

    def _prompt(self, qkv: Tensor, call: Call, step: Prompt) -> Tensor:
        """The tokens of an empty cache, qkv [B * S, (queries + 2 keys) * width]."""
        layer = step.layer(self.layer_idx)
        cos, sin = (None, None) if call.tables is None or not self.rope else step.angles(call.tables)
        q = torch.ops.zq.store_kv(
            qkv, layer.keys, layer.values, None, None, step.places, cos, sin, self.queries, self.keys,
            ROPES[self.rope], *self._norms(), self.eps, call.length,
        )  # fmt: skip
        q = q.view(call.batch, call.length, self.queries, self.width).transpose(1, 2)
        k, v = (x[:, :, : call.length] for x in (layer.keys, layer.values))
        call = call._replace(mask=step.added(q.dtype))
        return self._scores(q, k, v, call).reshape(call.batch * call.length, -1)

    def _norms(self) -> tuple[Tensor | None, Tensor | None]:
        """Of a query head and of a key head [D]."""
        both = self.head_norm
        return (None, None) if both is None else (both[0], both[self.queries])

    def _angles(self, call: Call, step: Step) -> tuple[Tensor | None, Tensor | None]:
        """Cosine and sine [B, r] of the present positions."""
        turn = step.turn() if self.rope else None
        if turn is not None:
            return turn[0], turn[1]
        if not self.rope:
            return None, None
        assert call.tables is not None
        cos, sin = (x.reshape(call.batch, -1) for x in call.tables)
        return cos, sin

    def _one(self, q: Tensor, k: Tensor, v: Tensor, call: Call, step: Step) -> Tensor:
        """A new token of each row, q [B, 1, Hq, D]: written to the static cache, then looked at."""
        keys, values = step.write(self.layer_idx, k.transpose(1, 2), v.transpose(1, 2))
        mask = _bias(call, step.added(call.mask, q.dtype))
        return decode(q[:, 0], keys, values, mask, self.scaling)

    def _scores(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        name = self.config._attn_implementation
        function: Any = ALL_ATTENTION_FUNCTIONS["sdpa" if name == "eager" else name]
        more = {**call.more, "sliding_window": self.window, "position_ids": call.positions}
        more = {name: value for name, value in more.items() if value is not None}
        mask = _bias(call, call.mask)
        return function(self.module, q, k, v, mask, dropout=0.0, scaling=self.scaling, **more)[0]

    def _rotated(self, x: Tensor, call: Call) -> Tensor:
        """x [B, S, H, D] with its first r of every head turned by the angle of its position."""
        if self.first or self.shared.turn is None or torch.compiler.is_compiling():
            self.shared.turn = self._turn(call, x.dtype)
        cos, sin = self.shared.turn  # [B or 1, S, 1, r], the sine with its sign
        r = cos.shape[-1]
        part = x[..., :r]
        if self.rope == "halves":
            partner = part.roll(r // 2, -1)
        else:
            partner = part.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        turned = torch.addcmul(part * cos, partner, sin)
        return turned if r == x.shape[-1] else torch.cat((turned, x[..., r:]), -1)

    def _turn(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.rope == "halves":
            assert call.tables is not None
            cos, sin = call.tables
            low, high = sin.chunk(2, -1)
            signed = torch.cat((-low, high), -1)
        else:  # GPT-J keeps a table of [sin | cos] for every position
            low, high = self._pairs(call, dtype)
            cos = high.repeat_interleave(2, -1)
            signed = torch.stack((-low, low), -1).flatten(-2)
        return cos.to(dtype).unsqueeze(2), signed.to(dtype).unsqueeze(2)

    def _pairs(self, call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sine and cosine [B, S, r / 2] of GPT-J, which its model has computed since transformers 5.24."""
        if call.tables is not None:
            return call.tables
        assert call.positions is not None
        table: Tensor = self.module.embed_positions
        low, high = table.to(call.positions.device)[call.positions].to(dtype).chunk(2, -1)
        return low, high


def text_fits(device: torch.device, attend: Attention, codes: bool) -> bool:
    """Whether a device runs zq's attention of texts with these heads."""
    if device.type != "cuda":
        return False
    return text_shape(describe(device.index), attend.queries, attend.width, codes) is not None


def decode(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
    """One new token over a static cache by torch's attention, for what zq's own does not take.

    q [B, Hq, D]; keys, values [B, Hkv, L, D], one layer of the cache, the new token already in it; mask
    [B or 1, 1 or Hq, 1, L], added to the scores. Returns [B, Hq * D].
    """
    batch, queries, width = q.shape
    grouped = q.reshape(batch, keys.shape[1], -1, width)  # heads that share keys are rows of one product
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], keys.shape[1], -1, mask.shape[-1])
    y = nn.functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return y.reshape(batch, queries * width)


def _bias(call: Call, mask: Tensor | None) -> Tensor | None:
    """The mask, with BLOOM's alibi [B * H, 1, L] added to it."""
    if call.alibi is None:
        return mask
    alibi = call.alibi.view(call.batch, -1, 1, call.alibi.shape[-1])
    return alibi if mask is None else alibi + mask
