"""What every accuracy figure here is measured on and with: texts, tokens, clocks, the results file."""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import zq
from zq.data import evaluation_windows, load_text, tokenize
from zq.eval.adapt import decoder_logits
from zq.eval.divergence import divergence
from zq.models.find import load_tokenizer
from zq.source import resolve

CALIBRATION = "calibration"  # the name of the calibration text among the evaluation texts


def first_blocks(folder: Path, count: int, out: Path) -> Path:
    """A checkpoint in `out` of the first `count` blocks of the model in `folder`, which has as many:
    transformers would make up others."""
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=count, dtype="auto")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def exact_calibration(
    text: str, tokenizer: Any, samples: int, length: int, start: float
) -> tuple[str, Tensor]:
    """(a slice of `text`, int64 [samples, length]): the first samples * length tokens from the fraction
    `start` of its characters on, and the text that gives just these tokens, so that zq, which spreads its
    windows over all there is, takes them one after another.

    Exits where the text is too short or the slice on its own has other tokens than within the text.
    """
    rest = text[int(start * len(text)) :]
    count = samples * length
    ids, ends = (
        tokenize(rest, tokenizer),
        tokenizer(rest, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ],
    )
    if len(ids) < count:
        raise SystemExit(
            f"the calibration text has {len(ids)} tokens from {start:.0%} on; {count} are needed"
        )
    cut = rest[: ends[count - 1][1]]
    if tokenize(cut, tokenizer) != ids[:count]:
        raise SystemExit(
            f"the first {count} tokens from {start:.0%} of the calibration text on are not the tokens of "
            "their own text (a word is cut at the end); change --samples, --length or --calibration-start"
        )
    return cut, torch.tensor(ids[:count], dtype=torch.int64).view(samples, length)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What accuracy.py and peers.py have in common."""
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=FILE", help="to evaluate on")
    parser.add_argument("--windows", type=int, default=24, help="of each text")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window, everywhere")
    parser.add_argument("--start", type=float, default=0.55, help="of the evaluation: a share of the text")
    parser.add_argument("--calibration", metavar="FILE", help="text")
    parser.add_argument("--calibration-start", type=float, default=0.02)
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument(
        "--on-calibration", action="store_true", help="evaluate on that text too, from --start"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=".*", help="regex over the names of rows, see --show")
    parser.add_argument("--out", type=Path, help="JSON; rows that it has already are not measured again")
    parser.add_argument("--commit", help="to note in the results, where there is no git")


@dataclass
class Setting:
    """A model and the tokens that it is quantized and measured with.

    texts        evaluation windows by name, int64 [windows, length] each
    calibration  int64 [samples, length], and `slice`, the text of just these tokens; None without a text
    """

    folder: Path
    tokenizer: Any
    device: str
    texts: dict[str, Tensor]
    calibration: Tensor | None
    slice: str
    protocol: dict[str, Any]

    def measure(self, load: Callable[[], Any]) -> dict[str, Any]:
        """{"texts": by name what zq.eval.divergence says, "mean_kl": over the texts that did not calibrate}.
        `load` gives the candidate, a transformers model."""
        reference, candidate = zq.load(str(self.folder), device=self.device, kernels=False), load()
        both = decoder_logits(reference), decoder_logits(candidate)
        found = {name: divergence(*both, windows).to_dict() for name, windows in self.texts.items()}
        kls = [measured["kl"] for name, measured in found.items() if name != CALIBRATION]
        return {"texts": found, "mean_kl": sum(kls) / len(kls)}


def setting(args: argparse.Namespace) -> Setting:
    """Reads and tokenizes everything; exits where something is missing or too short."""
    if not args.text:
        raise SystemExit("give at least one --text NAME=FILE to evaluate on")
    folder = resolve(args.model, print)
    tokenizer = load_tokenizer(folder)
    files = dict(pair.split("=", 1) for pair in args.text)
    protocol: dict[str, Any] = {"windows": args.windows, "length": args.length, "start": args.start}
    slice_, calibration = "", None
    if args.calibration:
        text = load_text(args.calibration)
        slice_, calibration = exact_calibration(
            text, tokenizer, args.samples, args.length, args.calibration_start
        )
        if int(args.calibration_start * len(text)) + len(slice_) > int(args.start * len(text)):
            raise SystemExit(
                "the calibration tokens reach into what --start evaluates on; use fewer --samples"
            )
        protocol["calibration"] = {
            "file": _named(args.calibration),
            "samples": args.samples,
            "start": args.calibration_start,
        }
        if args.on_calibration:
            files[CALIBRATION] = args.calibration
    protocol["texts"] = {name: _named(file) for name, file in files.items()}
    texts = {
        name: evaluation_windows(load_text(file), tokenizer, args.windows, args.length, args.start)
        for name, file in files.items()
    }
    return Setting(folder, tokenizer, args.device, texts, calibration, slice_, protocol)


def _named(file: str) -> str:
    """The file's name and the beginning of its hash."""
    return f"{Path(file).name} sha256:{hashlib.sha256(load_text(file).encode()).hexdigest()[:16]}"


class Cost:
    """Wall seconds and peak memory of what happens inside, beyond what is on the device already.

    gpu   bytes of torch.cuda.max_memory_allocated; None on a CPU
    rss   peak bytes of the process, torch and CUDA themselves included; None where Linux cannot reset it
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.seconds, self.gpu, self.rss = 0.0, None, None

    def __enter__(self) -> Cost:
        gc.collect()
        if self.cuda:
            torch.cuda.init()  # there is nothing to reset before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self._resets = True
        except OSError:
            self._resets = False
        self._begun = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.gpu = torch.cuda.max_memory_allocated() - self._before
        self.seconds = time.perf_counter() - self._begun
        self.rss = peak_rss() if self._resets else None

    def to_dict(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 2), "peak_gpu_bytes": self.gpu, "peak_rss_bytes": self.rss}


def peak_rss() -> int | None:
    """VmHWM of this process in bytes. Not ru_maxrss: a process inherits that from the one that started it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


def environment(device: str, **more: str) -> dict[str, Any]:
    """Device and versions; `more` for further packages."""
    cuda = device.startswith("cuda")
    name = torch.cuda.get_device_name() if cuda else f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "device": name,
        **({} if cuda else {"threads": torch.get_num_threads()}),
        "zq": zq.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        **more,
    }


def commit_of(given: str | None) -> str:
    """What is checked out now, so ask before the first row; "unknown" where there is no git."""
    if given:
        return given
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return git.stdout.strip() or "unknown"


KEY = ("table", "scheme", "method", "seed")


class Results:
    """The rows measured so far, and the JSON file that is written again with each.

    Exits when the file was made elsewhere or by another protocol: such rows must not stand in one table.
    """

    def __init__(self, path: Path | None, environment: dict[str, Any], protocol: dict[str, Any]) -> None:
        self.path = path
        self.document: dict[str, Any] = {"environment": environment, "protocol": protocol, "rows": []}
        if path and path.exists():
            self.document = json.loads(path.read_text(encoding="utf-8"))
            for key, ours in (("environment", environment), ("protocol", protocol)):
                if self.document[key] != ours:
                    raise SystemExit(
                        f"{path} was made with the {key} {self.document[key]}, this run has {ours}; give "
                        "another --out"
                    )

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self.document["rows"]

    def find(self, **wanted: Any) -> dict[str, Any] | None:
        """The first row that has these values."""
        return next((row for row in self.rows if all(row[k] == v for k, v in wanted.items())), None)

    def add(self, row: dict[str, Any]) -> None:
        """In the place of the row with the same KEY, if there is one."""
        same = self.find(**{key: row[key] for key in KEY})
        if same is None:
            self.rows.append(row)
        else:
            self.rows[self.rows.index(same)] = row
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_suffix(".new")
            fresh.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
            fresh.replace(self.path)
