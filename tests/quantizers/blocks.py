"""One block of a tiny model, loaded and fed as the pipeline does it, for tests of single steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from zq.checkpoint.reader import reader
from zq.pipeline import _capture, _feed, _load
from zq.plan import Plan, make_plan
from zq.quantizers.method import Block, BlockLink
from zq.recipe import Recipe

TEXT = """
rules: [RULES]
steps: [STEPS]
calibration: {source: random, samples: SAMPLES, length: 16}
"""


def recipe(rules: str, steps: str, samples: int = 8) -> Recipe:
    text = TEXT.replace("RULES", rules).replace("STEPS", steps).replace("SAMPLES", str(samples))
    return Recipe.parse(text)


def load_block(folder: Path, rules: str, steps: str, samples: int = 8) -> tuple[Plan, Block]:
    """The plan, and block 0 with its inputs; nothing is done to it yet."""
    plan = make_plan(folder, recipe(rules, steps, samples))
    read = reader(plan.index)
    with torch.no_grad():
        captured = _capture(plan, read, plan.windows)
        assert captured is not None
        block = _load(plan, 0, read)
        _feed(plan, block, 0, captured, list(captured.hidden), list(captured.hidden), read)
    return plan, block


def link_to(block: Block, consumer: str) -> BlockLink:
    """The link that leads to the layer whose name ends so."""
    return next(x for x in block.links if any(c.name.endswith(consumer) for c in x.consumers))


def random_scale(link: BlockLink, seed: int = 0) -> Tensor:
    """Positive, over a factor of about 50, one value per channel of the consumers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.exp(torch.randn(len(link.channels), generator=generator))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    """||a - b|| / ||b|| over all batches."""
    error = sum(float((x.float() - y.float()).square().sum()) for x, y in zip(a, b, strict=True))
    return (error / sum(float(y.float().square().sum()) for y in b)) ** 0.5
