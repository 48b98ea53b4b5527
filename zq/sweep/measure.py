"""One cell: quantized by the real pipeline into a folder, audited, loaded, compared with its original.

Then the folder is deleted. What is measured is what `zq quantize` would have written; sizes are those of the
tensors in the headers of the file that was loaded. The original's logits are computed once per model, and
kept where they fit.
"""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.index import read_index
from zq.errors import ZqError
from zq.eval.adapt import decoder_logits
from zq.eval.divergence import token_values
from zq.models.find import load_tokenizer
from zq.numerics.metrics import tensor_hash
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.recipe import Recipe
from zq.runtime.load import load_decoder
from zq.sweep.grid import PLAIN, Cell, recipe_of
from zq.sweep.store import Row, key_of
from zq.sweep.subjects import Subject
from zq.sweep.tasks import accuracies

KEEP = 1 << 30  # bytes of the original's logits


def cell_key(subject: Subject, cell: Cell, base: Recipe, setting: dict[str, Any]) -> str:
    """What a finished cell is found by."""
    recipe = "original" if cell.spec is None else recipe_of(cell, base).digest
    return key_of(subject.identity, recipe, setting)


def planned(subject: Subject, cell: Cell, base: Recipe, device: str = "cpu") -> Plan:
    """The plan of a cell (of its original: one that tells the parts of the model). Raises ZqError."""
    recipe = recipe_of(PLAIN) if cell.spec is None else recipe_of(cell, base)
    return make_plan(subject.folder, recipe, device=device)


def sizes(plan: Plan, cell: Cell, folder: Path | None = None) -> dict[str, int]:
    """Bytes of tensors: {"all", "blocks"}, the latter without embeddings, head and what else is outside of
    the transformer blocks. As in the headers in `folder`, or as planned; of an original, what the model
    uses."""
    inside = {slot.name for unit, slots in plan.units.items() if isinstance(unit, int) for slot in slots}
    if cell.spec is None:
        blocks = {name for unit in plan.units if isinstance(unit, int) for name in plan.skeleton.zone(unit)}
        found = {row["name"]: plan.source(row["name"]).nbytes for row in plan.rows()}
        inside = blocks
    elif folder is not None:
        found = {name: info.nbytes for name, info in read_index(folder).tensors.items()}
    else:
        found = {slot.name: slot.nbytes for slots in plan.units.values() for slot in slots}
    return {
        "all": sum(found.values()),
        "blocks": sum(size for name, size in found.items() if name in inside),
    }


class Remembered:
    """The logits of a model, input_ids [B, L] -> [B, L, V]: the same bits again for ids that it has seen, as
    long as all of them stay below KEEP bytes."""

    def __init__(self, model: Any) -> None:
        self._logits = decoder_logits(model)
        self._kept: dict[str, Tensor] = {}
        self.nbytes = 0

    def __call__(self, ids: Tensor) -> Tensor:
        key = tensor_hash(ids)
        if key in self._kept:
            return self._kept[key]
        found = self._logits(ids)
        if self.nbytes + found.nbytes <= KEEP:
            self._kept[key] = found
            self.nbytes += found.nbytes
        return found


class Bench:
    """Measures cells on one device; `scratch` is a folder of its own."""

    def __init__(self, device: str, setting: dict[str, Any], base: Recipe, scratch: Path) -> None:
        self.device, self.setting, self.base, self.scratch = device, setting, base, scratch
        self._subject: Subject | None = None
        self._original: Any = None
        self._reference: Any = None

    def measure(self, subject: Subject, cell: Cell) -> Row:
        """The row of a finished cell. Raises ZqError, OutputError (disk) or AuditError."""
        begun = time.monotonic()
        plan = planned(subject, cell, self.base, self.device)
        try:
            if cell.spec is None:
                folder, bits = None, float(cell.bits)
            else:
                shutil.rmtree(self.scratch, ignore_errors=True)
                quantize(plan, self.scratch)
                folder, bits = self.scratch, plan.bits_per_weight
            quantized = time.monotonic()
            values = self._compare(subject, folder)
            return {
                "key": cell_key(subject, cell, self.base, self.setting),
                "cell": vars(cell),
                "model": {
                    "name": subject.name,
                    "identity": subject.identity,
                    "parameters": _parameters(plan),
                },
                "recipe": "original" if cell.spec is None else plan.recipe.digest,
                "setting": self.setting,
                "tokens": tensor_hash(torch.tensor(subject.windows)),
                "bytes": sizes(plan, cell, folder),
                "bits_per_weight": bits,
                **values,
                "seconds": {
                    "quantize": round(quantized - begun, 2),
                    "measure": round(time.monotonic() - quantized, 2),
                },
            }
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def _compare(self, subject: Subject, folder: Path | None) -> dict[str, Any]:
        if self._subject != subject:
            self._original = self._reference = None  # frees the last one before the next is loaded
            self._original = load_decoder(subject.folder, device=self.device)
            self._reference, self._subject = Remembered(self._original), subject
        model = load_decoder(folder, device=self.device) if folder else self._original
        candidate = decoder_logits(model) if folder else self._reference
        windows = torch.tensor(subject.windows)
        values = token_values(self._reference, candidate, windows, self.setting["batch"])
        report = values.report()
        found = {
            "kl": report.kl,
            "kl_standard_error": report.kl_standard_error,
            "kl_p99": report.kl_p99,
            "top1_agreement": report.top1_agreement,
            "nll": report.candidate.nll,
            "nll_standard_error": report.candidate.nll_standard_error,
            "ppl": report.candidate.ppl,
            "kl_windows": values.kl.double().mean(1).tolist(),
            "nll_windows": values.candidate.double().mean(1).tolist(),
        }
        if not math.isfinite(report.kl) or not math.isfinite(report.candidate.ppl):
            raise ZqError(
                "the KL or the perplexity is infinite: the quantized model rules out what comes; take more "
                "bits or smaller blocks"
            )
        if tasks := self.setting["tasks"]:
            limit = self.setting["limit"]
            found["tasks"] = accuracies(model, load_tokenizer(subject.folder), tasks, limit)
        return found


def _parameters(plan: Plan) -> dict[str, int]:
    """Values that the model has, as it was."""
    rows = plan.rows()
    blocks = {name for unit in plan.units if isinstance(unit, int) for name in plan.skeleton.zone(unit)}
    count = {row["name"]: math.prod(row["shape"]) for row in rows}
    return {
        "all": sum(count.values()),
        "blocks": sum(number for name, number in count.items() if name in blocks),
    }
