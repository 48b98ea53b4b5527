"""Does distillation with an integer backward pass end where the float one does? (`lkd: {gradients: int8}`)

    python benchmarks/gradients.py demo --out benchmarks/results/gradients-smollm2-cpu.json
    python benchmarks/gradients.py demo --blocks 2 --iterations 6 --samples 8 --seeds 1       a quick look

`rtn`, then `lkd` with every kind of gradients, from the same start on the same windows in the same order:
those of the seed. A row has the held-out loss of every block at the start and at the end. With `inputs:
float` every block sees the same whatever the ones before it have learned, so each block of each seed is a
sample of its own; with `inputs: quantized`, the default, a block starts from what the ones before it left,
and only seeds are. The table has the geometric mean of the ends, paired, with a t interval over the samples.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import tables
import torch
import yaml
from optim import refresh
from protocol import Results, commit_of, environment, first_blocks
from transformers import AutoConfig

from zq.distill.integer import GRADIENTS
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe
from zq.source import resolve


def recipe(args: argparse.Namespace, inputs: str, gradients: str, seed: int) -> Recipe:
    learned = {"iterations": args.iterations, "batch": args.batch, "lookahead": args.lookahead}
    learned |= {"holdout": args.holdout, "inputs": inputs, "gradients": gradients}
    return Recipe.parse(
        yaml.safe_dump(
            {
                "rules": [{"match": "*", "weights": args.weights}],
                "steps": [{"rtn": {}}, {"lkd": learned}],
                "calibration": {"samples": args.samples, "length": args.length},
                "seed": seed,
            }
        )
    )


def losses(folder: Path, wanted: Recipe, device: str) -> dict[str, Any]:
    """Of every block, and the seconds of the whole run."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        report = quantize(make_plan(folder, wanted, device=device), Path(scratch) / "out").report
    return {"held_out_loss": report["held_out_loss"], "seconds": round(time.perf_counter() - begun, 1)}


def main(report: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--blocks", type=int, help="only the first so many of the model; default: all")
    parser.add_argument("--weights", default="int4:g64")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lookahead", type=int, default=0)
    parser.add_argument("--holdout", type=float, default=0.25)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--gradients", nargs="+", choices=GRADIENTS, default=["float", "int8"])
    parser.add_argument("--inputs", nargs="+", choices=["float", "quantized"], default=["float", "quantized"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON, continued when it is there")
    parser.add_argument("--write", type=Path, help="a page whose tables are made again from the results")
    parser.add_argument("--commit")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    commit = commit_of(args.commit)
    wanted = ("blocks", "weights", "iterations", "batch", "lookahead", "holdout", "samples", "length")
    settings = {"model": Path(args.model).name} | {key: vars(args)[key] for key in wanted}
    results = Results(args.out, environment(args.device), settings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = resolve(args.model, report)
        if args.blocks is not None:
            there = AutoConfig.from_pretrained(folder).num_hidden_layers
            if not 1 <= args.blocks <= there:
                raise SystemExit(f"--blocks {args.blocks} is not allowed; the model has {there}")
            folder = first_blocks(folder, args.blocks, Path(scratch))
        for seed, inputs, gradients in product(range(args.seeds), args.inputs, args.gradients):
            key = {"table": "gradients", "scheme": inputs, "method": gradients, "seed": seed}
            if results.find(**key):
                continue
            found = losses(folder, recipe(args, inputs, gradients, seed), args.device)
            results.add({**key, "commit": commit, **found})
            report(f"inputs {inputs}, gradients {gradients}, seed {seed}: {found['seconds']} s")
    report(tables.gradients(results.document))
    refresh(args.write)


if __name__ == "__main__":
    main()
