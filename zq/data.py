"""Text and token windows: what a quantizer is calibrated on and what a checkpoint is measured on.

A window is `length` consecutive tokens, int64, without special tokens; windows never overlap.

    calibration   the tokens are cut into `samples` equal stretches and one window is drawn, seeded,
                  from each: windows are spread evenly over the text and cannot overlap
    evaluation    consecutive windows from a fraction of the text's characters on: nothing is drawn,
                  so the same call gives the same tokens to everybody

A source is named by one string:

    bundled | bundled-eval                  the two texts in the package (zq/texts, different documents)
    random                                  seeded random token ids: needs no text and no tokenizer
    path/to/file                            UTF-8 text; .jsonl (an object with "text" per line); .parquet
    hf:dataset[:config][:split][:column]    a Hugging Face data set; empty parts mean its default
                                            configuration, split train, column text

The windows of a model's calibration never depend on the machine: Python's `random` and torch's CPU
generator give the same numbers for a seed everywhere.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zq.errors import ZqError

if TYPE_CHECKING:
    from torch import Tensor

BUNDLED = {"bundled": "calibration.txt", "bundled-eval": "evaluation.txt"}
RANDOM = "random"
SOURCES = "bundled, bundled-eval, random, a .txt, .jsonl or .parquet file, or hf:dataset:config"
BEGINNING = 4  # tokens
HF_LIMIT = 64 << 20  # characters; a data set is read only until this much is there


def load_text(source: str) -> str:
    """The text that `source` names (see above; not `random`, which has none).

    Raises ZqError when the source is unknown, unreadable, empty or not UTF-8.
    """
    if not source.strip():
        raise ZqError(f"the name of a text is empty; allowed are {SOURCES}")
    if source == RANDOM:
        raise ZqError("random is no text: it can calibrate but not evaluate; use bundled-eval or a file")
    if source in BUNDLED:
        text = (resources.files("zq") / "texts" / BUNDLED[source]).read_text(encoding="utf-8")
    elif source.startswith("hf:"):
        text = _read_hub(source)
    else:
        text = _read_file(Path(source).expanduser())
    if not text.strip():
        raise ZqError(f"the text {source} is empty; allowed are {SOURCES}")
    return text


def calibration_windows(
    source: str, tokenizer: Any, vocab_size: int, samples: int, length: int, seed: int = 0
) -> Tensor:
    """`samples` windows of `length` tokens: int64 [samples, length] on the CPU, in text order.

    `tokenizer` is a transformers tokenizer (unused for `random`, where None will do); `vocab_size`
    is the model's, an exclusive bound of every id. The same arguments give the same windows.
    Raises ZqError when the text has fewer than samples * length tokens.
    """
    import torch

    _require_positive(samples=samples, length=length)
    if source == RANDOM:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(vocab_size, (samples, length), generator=generator)
    ids = tokenize(load_text(source), tokenizer)
    if len(ids) < samples * length:
        raise ZqError(
            f"the calibration text {source} has {len(ids)} tokens; {samples} windows of {length} "
            f"need {samples * length}: {_shorter(len(ids), length)}"
        )
    draw = random.Random(seed)
    windows = []
    for i in range(samples):
        first, end = i * len(ids) // samples, (i + 1) * len(ids) // samples
        begin = first + draw.randrange(end - first - length + 1)
        windows.append(ids[begin : begin + length])
    return _checked(torch.tensor(windows, dtype=torch.int64), vocab_size)


def evaluation_windows(
    text: str,
    tokenizer: Any,
    windows: int,
    length: int,
    start: float = 0.0,
    *,
    vocab_size: int | None = None,
) -> Tensor:
    """The first `windows` windows of text[int(start * len(text)):]: int64 [windows, length].

    `start` is a fraction of the text's characters, 0 <= start < 1. Raises ZqError when the rest of
    the text is too short, or when an id is not below `vocab_size` (if given).
    """
    import torch

    _require_positive(windows=windows, length=length)
    if not 0.0 <= start < 1.0:
        raise ZqError(f"start = {start} is no fraction of the text; allowed is 0 <= start < 1")
    ids = tokenize(text[int(start * len(text)) :], tokenizer)
    if len(ids) < windows * length:
        raise ZqError(
            f"the evaluation text has {len(ids)} tokens from {start:.0%} of its characters on; "
            f"{windows} windows of {length} need {windows * length}: {_shorter(len(ids), length)}"
        )
    kept = torch.tensor(ids[: windows * length], dtype=torch.int64).view(windows, length)
    return _checked(kept, vocab_size)


def beginnings(windows: Tensor, count: int, vocab_size: int, start: int | None, seed: int) -> Tensor:
    """`count` beginnings for a model to go on from: int64 [count, BEGINNING].

    Every second one is cut from `windows` [S, T]; the others (all, when there are no windows) are random
    ids below `vocab_size` after the model's `start` token, if it has one. The same arguments give the same.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (count, BEGINNING), generator=generator)
    if start is not None:
        ids[:, 0] = start
    if len(windows):
        length = min(BEGINNING, windows.shape[1])
        window = torch.randint(len(windows), (count,), generator=generator)
        first = torch.randint(windows.shape[1] - length + 1, (count,), generator=generator)
        cut = windows[window[:, None], first[:, None] + torch.arange(length)]
        ids[1::2, :length] = cut[1::2]
    return ids


def mixed(windows: Tensor, more: Tensor, seed: int) -> Tensor:
    """Both [S, T] as one, in a seeded order, so that every part holds some of each."""
    import torch

    both = torch.cat([windows, more])
    return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(seed))]


def tokenize(text: str, tokenizer: Any) -> list[int]:
    """Token ids of `text` without special tokens (no BOS, no [CLS])."""
    # verbose=False: the text is meant to be longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def describe(windows: Tensor) -> dict[str, int | float]:
    """Facts that show a degenerate text: windows, length, tokens, distinct tokens, and the share of
    the most frequent token (0..1)."""
    _, counts = windows.unique(return_counts=True)
    return {
        "windows": windows.shape[0],
        "length": windows.shape[1],
        "tokens": windows.numel(),
        "distinct": counts.numel(),
        "most_frequent_share": counts.max().item() / windows.numel(),
    }


def _checked(windows: Tensor, vocab_size: int | None) -> Tensor:
    """`windows`, unless an id lies outside the model's vocabulary."""
    if vocab_size is not None and (highest := int(windows.max())) >= vocab_size:
        raise ZqError(
            f"the tokenizer gives token id {highest}, the model's vocab_size is {vocab_size}: "
            "they do not belong together; use the tokenizer of this very model"
        )
    return windows


def _shorter(tokens: int, length: int) -> str:
    """What to do about a text of too few tokens for the windows that were asked for."""
    fits = f"or at most {tokens // length} windows" if tokens >= length else "or shorter windows"
    return f"give a longer text, {fits}"


def _require_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ZqError(f"{name} = {value} is not allowed; give a whole number of at least 1")


def _read_file(path: Path) -> str:
    try:
        if not path.exists():
            raise ZqError(f"no text at {path}; allowed are {SOURCES}")
        if path.suffix == ".parquet":
            return _join(_parquet_texts(path))
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ZqError(
            f"{path} is not UTF-8 (byte {error.start}): convert it, for example with iconv -f latin1 -t utf-8"
        ) from error
    except OSError as error:
        raise ZqError(f"{path} cannot be read: {error.strerror}; {SOURCES} are allowed") from error
    return _join(_json_texts(path, text)) if path.suffix == ".jsonl" else text


def _join(texts: Iterable[str]) -> str:
    """Documents, apart by one empty line."""
    return "\n\n".join(texts)


def _json_texts(path: Path, content: str) -> Iterable[str]:
    # split("\n"), not splitlines(): JSON strings may contain other line separators as they are.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ZqError(
                f'{path} line {number} is not a JSON object with a "text"; '
                'each line must read like {"text": "..."}'
            ) from error
        if not isinstance(text, str):
            raise ZqError(f'{path} line {number}: "text" is {type(text).__name__}, not a string')
        yield text


def _parquet_texts(path: Path) -> list[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ZqError(
            f"{path} needs the package pyarrow; run: pip install 'zq[data]', or give a .txt file"
        ) from error
    import pyarrow

    try:
        column = parquet.read_table(path, columns=["text"])["text"].to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        why = str(error).splitlines()[0]
        raise ZqError(
            f"{path} is no parquet file with a column named text: {why}; give one, or a .txt or .jsonl file"
        ) from error
    return [text for text in column if isinstance(text, str)]


def _read_hub(source: str) -> str:
    """hf:dataset[:config][:split][:column], streamed until HF_LIMIT characters are there."""
    parts = source.split(":")[1:]
    if not parts[0] or len(parts) > 4:
        raise ZqError(f"{source} is not hf:dataset[:config][:split][:column]")
    name, config, split, column = parts + [""] * (4 - len(parts))
    column = column or "text"
    try:
        import datasets
    except ImportError as error:
        raise ZqError(
            f"{source} needs the package datasets; run: pip install 'zq[data]', or use bundled"
        ) from error
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        texts, size = [], 0
        for row in rows:
            texts.append(str(row[column]))
            size += len(texts[-1])
            if size > HF_LIMIT:
                break
    except KeyError as error:
        raise ZqError(
            f"{source} has no column {column}; name the right one: "
            f"hf:{name}:{config}:{split or 'train'}:COLUMN"
        ) from error
    # datasets raises errors of a dozen packages (network, files, parsers): none is a bug of zq.
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ZqError(f"{source} cannot be loaded: {why}; offline, use bundled or a file") from error
    return _join(texts)
