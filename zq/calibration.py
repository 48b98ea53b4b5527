"""The tokens that run through the blocks: windows of text, and windows that the model writes itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zq.checkpoint.job import Job
from zq.checkpoint.reader import Read
from zq.data import BEGINNING, beginnings, calibration_windows, describe, mixed
from zq.errors import ZqError
from zq.methods import refuse_few
from zq.models.capture import positions
from zq.models.find import load_tokenizer
from zq.models.sampling import pieces, write_windows
from zq.models.skeleton import Skeleton
from zq.quantizers.method import TOKENS, Method, portions
from zq.recipe import Recipe

KEPT = "generated"


def writable(recipe: Recipe, skeleton: Skeleton, notes: list[str]) -> Recipe:
    """The recipe without the windows that the model would write, where it is an encoder."""
    count = recipe.calibration.generated
    if not count or not skeleton.arch.encoder:
        return recipe
    notes.append(f"an encoder writes no text: calibration goes without the {count} windows of 'generated'")
    return replace(recipe, calibration=replace(recipe.calibration, generated=0))


def planned_windows(
    folder: Path,
    skeleton: Skeleton,
    recipe: Recipe,
    steps: list[tuple[Method, Any]],
    notes: list[str],
) -> Tensor | None:
    """Calibration tokens [samples, length]; None when the recipe wants none."""
    wanted = recipe.calibration
    if wanted.source == "none" and recipe.bits:
        raise ZqError(f"{recipe.bits.where}: bits are chosen by calibration tokens; drop --calib none")
    if wanted.source == "none" and not wanted.generated:
        if hungry := [method.name for method, options in steps if method.needs(options) & TOKENS]:
            raise ZqError(f"step '{hungry[0]}' of {recipe.where} needs calibration tokens; drop --calib none")
        return None
    refuse_few(recipe, wanted.generated + (0 if wanted.source == "none" else wanted.samples))
    length = min(wanted.length, positions(skeleton) or wanted.length)
    if length < wanted.length:
        notes.append(f"calibration windows of {length} tokens: the model has no more positions")
    if wanted.generated and length <= BEGINNING:
        raise ZqError(
            f"the model cannot write calibration windows of {length} tokens, since it begins each with "
            f"{BEGINNING}; give --length {BEGINNING + 1} or more, or --generated 0"
        )
    if wanted.generated:
        notes.append(
            f"{wanted.generated} calibration windows are written by the model itself (sampled, seeded); for "
            "that it is loaded as a whole"
        )
    notes += _batches(steps, wanted.generated + (wanted.samples if wanted.source != "none" else 0))
    if wanted.source == "none":
        return torch.empty(0, length, dtype=torch.int64)
    tokenizer = (
        None if wanted.source == "random" else load_tokenizer(folder, ", or calibrate with --calib random")
    )
    vocabulary = skeleton.config.vocab_size
    return calibration_windows(wanted.source, tokenizer, vocabulary, wanted.samples, length, recipe.seed)


def _batches(steps: list[tuple[Method, Any]], windows: int) -> Iterator[str]:
    """A note about every step that gets other batches than it asks for."""
    asked = [(method.name, size) for method, options in steps if (size := method.batch(options))]
    size = min([windows, *(size for _, size in asked)])
    for name, batch in asked:
        got = size * portions(batch, size, windows)
        if got != batch:
            why = f"of {windows}" if windows < batch else f"a multiple of {size}, which another step asks for"
            yield f"{name} learns from batches of {got} windows, {why}, where it asks for {batch}"


def all_windows(
    windows: Tensor | None,
    recipe: Recipe,
    skeleton: Skeleton,
    read: Read,
    job: Job,
    progress: Callable[[dict[str, Any]], None],
    written: Tensor | None = None,
) -> tuple[Tensor | None, dict[str, Any]]:
    """(the planned windows and those that the model writes, int64 [S, T], or None; facts for the report).

    `written` is what written_windows gave for the same model, recipe and windows, where that is known
    already. What the model writes is kept in the job, so that a resumed run sees the same tokens. `progress`
    gets {"written", "of"} while it writes, and {"calibration": the facts} at last.
    """
    wanted = recipe.calibration
    facts: dict[str, Any] = {"source": wanted.source}
    if windows is None:
        return None, facts
    if wanted.generated:
        kept = job.kept(KEPT)
        if kept is not None:
            written = kept
        else:
            if written is None:
                written = written_windows(windows, recipe, skeleton, read, progress)
            if written.shape != (wanted.generated, windows.shape[1]):
                raise ValueError(
                    f"written windows of shape {list(written.shape)}; the recipe and its text ask for "
                    f"{[wanted.generated, windows.shape[1]]}"
                )
            job.keep(KEPT, written.to(torch.int32))
        facts["generated"] = describe(written.long())
        windows = mixed(windows, written.long(), recipe.seed)
    facts |= describe(windows) | {"vocabulary": skeleton.config.vocab_size, "seed": recipe.seed}
    progress({"calibration": facts})
    return windows, facts


def written_windows(
    windows: Tensor,
    recipe: Recipe,
    skeleton: Skeleton,
    read: Read,
    progress: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Tensor:
    """int64 [generated, T] that the model writes for `windows` of text [S, T] and the recipe's seed."""
    length, seed, config = windows.shape[1], recipe.seed, skeleton.config
    count = recipe.calibration.generated * pieces(length)[0]
    begun = beginnings(windows, count, config.vocab_size, config.bos_token_id, seed)
    return write_windows(
        skeleton, read, begun, length, seed, lambda done, of: progress({"written": done, "of": of})
    )
