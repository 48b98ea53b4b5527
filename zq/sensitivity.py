"""What the model's predictions lose when one site alone is quantized, at each of several widths.

A site of block i, quantized, moves the block's output by d (per token, on the float model's own hidden
states). To second order the next-token distribution p of the whole model moves by

    KL(p || p') = 1/2 d^T F d,   F = E[g g^T],   g = gradient of log p(y) at the block's output, y ~ p

One y is drawn for each token, and tokens count one by one: 1/2 sum_t (g_t . d_t)^2 / tokens. So one pass
forward and one pass back through the float model, with one block in memory at a time, give g for every block
(the Fisher information of the end loss, as in the diagonal form of Dong et al. 2020, arXiv:1911.03852, but
along the actual error). The errors of the sites are then taken to add up.

A model without a language-model head has no p: there g is the pull-back of a random vector v ~ N(0, 1) from
the last hidden states h, since E[(v^T J d)^2] = ||J d||^2, and the figure is relative to ||h||^2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zq.checkpoint.reader import Read
from zq.errors import ZqError
from zq.models.capture import Call, capture_inputs, has_head, head, last_hidden, run_block
from zq.numerics.qtensor import SCALES, quantize
from zq.plan import Plan, PlannedLayer
from zq.quantizers.feeders import spreads
from zq.quantizers.method import Layer, Needs, quantized_inputs
from zq.quantizers.proxy import columns
from zq.spec import Scheme

MOST_TOKENS = 4096  # of the calibration windows, the first ones; each is kept before every block


@dataclass(frozen=True, kw_only=True)
class SiteWidths:
    """The layers of a block that read one input, and what they can become: by width in bits the scheme of
    each layer and the bytes of all."""

    name: str
    block: int
    layers: tuple[PlannedLayer, ...]
    schemes: dict[int, tuple[Scheme, ...]]
    nbytes: dict[int, int]

    def named(self, width: int) -> dict[str, Scheme]:
        """The schemes of the layers at a width, by name; {} when the format cannot hold that."""
        return {x.name: s for x, s in zip(self.layers, self.schemes.get(width, ()), strict=False)}


@dataclass
class _Pull:
    """The gradient g = values * 2^shift at the output of a block [B, T, D]. The shift keeps the values of a
    16-bit dtype in its range, whatever the depth."""

    values: Tensor
    shift: int = 0

    def normalised(self) -> _Pull:
        top = float(self.values.abs().max())
        by = math.frexp(top)[1] if 0 < top < math.inf else 0
        return _Pull(self.values * 2.0**-by, self.shift + by)


@torch.no_grad()
def measure(
    plan: Plan, sites: list[SiteWidths], progress: Callable[[dict[str, Any]], None]
) -> list[dict[int, float]]:
    """The error of every site at every width, nats per token (without a head: relative squared error).

    `progress` gets {"measured", "done", "of", "seconds"} after every block. Raises ZqError when
    activations are not finite.
    """
    read, skeleton = plan.view.read, plan.skeleton
    streams, calls = _forward(plan, read)
    _refuse_nan(plan, "the last block", all(bool(torch.isfinite(h).all()) for h in streams[-1]))
    pulls = _from_the_end(plan, streams.pop(), read)
    tokens = sum(pull.values.shape[0] * pull.values.shape[1] for pull in pulls)
    errors: dict[str, dict[int, float]] = {}
    keeps = any(Needs.SPREADS in method.needs(options) for method, options in plan.steps)
    for i in reversed(range(skeleton.n_blocks)):
        begun = time.monotonic()
        skeleton.load_block(i, read)
        block, inputs = skeleton.block(i), [h.to(skeleton.device) for h in streams.pop()]
        targets, pulls_before = _pull_back(block, inputs, calls[i], pulls)
        spread = spreads(skeleton, i, read) if keeps else {}
        for site in (site for site in sites if site.block == i):
            outcome = {}
            for width, schemes in site.schemes.items():
                with _quantized(plan, site, schemes, spread.get(site.name.rpartition(" ")[2])):
                    outputs = [run_block(block, h, call) for h, call in zip(inputs, calls[i], strict=True)]
                outcome[width] = _effect(outputs, targets, pulls) / tokens
            _refuse_nan(plan, site.name, all(map(math.isfinite, outcome.values())))
            errors[site.name] = outcome
        pulls = pulls_before
        skeleton.unload_block(i)
        done = {"done": skeleton.n_blocks - i, "of": skeleton.n_blocks}
        progress({"measured": skeleton.block_prefix(i), **done, "seconds": time.monotonic() - begun})
    return [errors[site.name] for site in sites]


def _refuse_nan(plan: Plan, place: str, finite: bool) -> None:
    if not finite:
        raise ZqError(
            f"the calibration activations are NaN or Inf at {place}, so no bits can be chosen; repair the "
            f"checkpoint, save it in a wider dtype than {plan.dtype}, or give no bits"
        )


def _forward(plan: Plan, read: Read) -> tuple[list[list[Tensor]], list[list[Call]]]:
    """Hidden states before every block and after the last one, in main memory: [block][batch]."""
    assert plan.windows is not None
    skeleton, windows = plan.skeleton, plan.windows
    skeleton.load_outside(read)
    batches = list(windows[: max(1, MOST_TOKENS // windows.shape[1])].split(4))
    captured = capture_inputs(skeleton, batches)
    skeleton.unload_outside()
    hidden = captured.hidden
    streams = [[h.cpu() for h in hidden]]
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, read)
        hidden = [run_block(skeleton.block(i), h, captured.calls[i][b]) for b, h in enumerate(hidden)]
        skeleton.unload_block(i)
        streams.append([h.cpu() for h in hidden])
    return streams, captured.calls


def _from_the_end(plan: Plan, hidden: list[Tensor], read: Read) -> list[_Pull]:
    """g after the last block, per batch; the logits of one window at a time."""
    skeleton = plan.skeleton
    skeleton.load_tail(read)
    generator = torch.Generator().manual_seed(plan.recipe.seed)
    predicts = has_head(skeleton)
    pulls = []
    for batch in hidden:
        rows = []
        for row in batch.split(1):
            with torch.enable_grad():
                x = row.to(skeleton.device).requires_grad_()
                if predicts:
                    logits = head(skeleton, x).float().flatten(0, 1)
                    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)
                    end = nn.functional.cross_entropy(logits, drawn.flatten().to(x.device), reduction="sum")
                else:
                    last = last_hidden(skeleton, x).float()
                    scale = (2 * last.shape[1] / last.detach().square().sum()).sqrt()
                    end = (last * torch.randn(last.shape, generator=generator).to(x.device) * scale).sum()
                rows.append(torch.autograd.grad(end, x)[0])
        pulls.append(_Pull(torch.cat(rows)).normalised())
    skeleton.unload_tail()
    return pulls


def _pull_back(
    block: nn.Module, inputs: list[Tensor], calls: list[Call], pulls: list[_Pull]
) -> tuple[list[Tensor], list[_Pull]]:
    """Outputs of the block, and g at its inputs from g at its outputs."""
    outputs, before = [], []
    for hidden, call, pull in zip(inputs, calls, pulls, strict=True):
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            y = run_block(block, x, call)
            (values,) = torch.autograd.grad(y, x, pull.values)
        outputs.append(y.detach())
        before.append(_Pull(values, pull.shift).normalised())
    return outputs, before


def _effect(outputs: list[Tensor], targets: list[Tensor], pulls: list[_Pull]) -> float:
    """1/2 sum over tokens of (g . d)^2."""
    total = 0.0
    for output, target, pull in zip(outputs, targets, pulls, strict=True):
        along = ((output.float() - target.float()) * pull.values.float()).sum(-1)
        total += 0.5 * float(along.double().square().sum()) * 4.0**pull.shift
    return total


@contextmanager
def _quantized(
    plan: Plan, site: SiteWidths, schemes: tuple[Scheme, ...], spread: Tensor | None
) -> Iterator[None]:
    """Inside, the layers of the site are rounded to nearest, but for columns that step `proxy` would keep,
    and quantize their inputs. `spread` [K] of the site as that step has it."""
    scale = next((o.scale for _, o in plan.steps if getattr(o, "scale", None) in SCALES), "mse")
    layers, before = [], []
    for planned, scheme in zip(site.layers, schemes, strict=True):
        module = plan.skeleton.model.get_submodule(planned.name)
        layer = Layer(planned.name, planned.kind, module, planned.transposed, scheme)
        weight = module.weight
        assert isinstance(weight, Tensor)
        before.append((weight, weight.detach().clone()))
        try:
            kept = planned.scheme.weights.kept if planned.scheme else 0
            places = columns(layer, spread, kept) if kept else None
            layer.replace(quantize(layer.weight, scheme.weights, scale, plan.dtype, places=places))
        except ZqError as error:
            raise ZqError(f"'{layer.name}.weight': {error}") from None
        layers.append(layer)
    try:
        with quantized_inputs(layers):
            yield
    finally:
        for weight, copy in before:
            weight.data.copy_(copy)
