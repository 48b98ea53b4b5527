"""Perplexity and KL divergence of every shipped scheme, by absmax and by MSE-searched scales.

usage: python benchmarks/accuracy.py MODEL --text NAME=FILE [--text NAME=FILE ...] [--windows 24]
       [--length 1024] [--start 0.55] [--device cuda] [--only REGEX] [--out results.json]
       [--commit HASH]

MODEL is what `zq quantize` takes. Each row is a full run of the pipeline into a temporary folder, loaded
back and compared with the original on the same windows. The JSON holds device, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import transformers

import zq
from zq.data import evaluation_windows, load_text
from zq.eval.adapt import decoder_logits
from zq.eval.divergence import divergence
from zq.models.find import load_tokenizer
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe, Step, load
from zq.source import resolve

SHIPPED = ("w8a8", "w8a16", "fp8", "w4w8a8", "w4a16", "w4a8", "w4afp8")


def rows() -> list[tuple[str, str, Recipe]]:
    """(scheme, scale choice, recipe), calibration off: nothing here needs tokens."""
    found = []
    for name in SHIPPED:
        base = load(name)
        base = replace(base, calibration=replace(base.calibration, source="none"))
        for scale in ("absmax", "mse"):
            found.append((name, scale, replace(base, steps=(Step("rtn", (("scale", scale),)),))))
        if name in ("w4a16", "w4a8"):
            text = str(base).replace("int4:gauto", "int4:gauto:narrow").replace("scale: mse", "scale: absmax")
            found.append((name, "absmax, narrow", Recipe.parse(text)))
    return found


def environment(device: str, commit: str | None) -> dict[str, str]:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu"
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "device": name,
        "zq": zq.__version__,
        "commit": commit or git.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--start", type=float, default=0.55)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default=".*", help="regex over 'scheme scale'")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    args = parser.parse_args()

    folder = resolve(args.model, print)
    tokenizer = load_tokenizer(folder)
    texts = dict(pair.split("=", 1) for pair in args.text)
    windows = {
        name: evaluation_windows(load_text(file), tokenizer, args.windows, args.length, args.start)
        for name, file in texts.items()
    }
    reference = decoder_logits(zq.load(str(folder), device=args.device))
    results = []
    columns = " ".join(f"{name + ' PPL':>14} {'KL':>7}" for name in windows)
    print(f"{'scheme':8} {'scale':15} {'bits':>6} {columns}")
    for scheme, scale, recipe in rows():
        if not re.search(args.only, f"{scheme} {scale}"):
            continue
        with tempfile.TemporaryDirectory() as scratch:
            begun = time.perf_counter()
            plan = make_plan(folder, recipe, device=args.device)
            report = quantize(plan, Path(scratch) / "out").report
            seconds = time.perf_counter() - begun
            candidate = decoder_logits(zq.load(str(Path(scratch) / "out"), device=args.device))
            measured = {n: divergence(reference, candidate, w).to_dict() for n, w in windows.items()}
        results.append(
            {
                "scheme": scheme,
                "scale": scale,
                "bits_per_weight": report["bits_per_weight"],
                "seconds": round(seconds, 2),
                "texts": measured,
            }
        )
        cells = " ".join(f"{m['candidate']['ppl']:14.3f} {m['kl']:7.4f}" for m in measured.values())
        print(f"{scheme:8} {scale:15} {report['bits_per_weight']:6.3f} {cells}", flush=True)
    first = results[0]["texts"]
    print("original " + " ".join(f"{n} PPL {m['reference']['ppl']:.3f}" for n, m in first.items()))
    if args.out:
        protocol = {"windows": args.windows, "length": args.length, "start": args.start}
        document = {
            "environment": environment(args.device, args.commit),
            "protocol": protocol,
            "rows": results,
        }
        args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
