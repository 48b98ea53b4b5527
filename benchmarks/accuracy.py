"""Perplexity, KL divergence and cost of zq's methods: each row is a full run of the pipeline.

    python benchmarks/accuracy.py demo --calibration FILE --text handbook=FILE --text c++=FILE
           --device cuda --out benchmarks/results/methods-smollm2-h200.json [--only REGEX] [--seeds 0,1,2]
           [--ablation [--scheme 'w3 g64'] | --scales]
    python benchmarks/accuracy.py --show [--ablation | --scales]      the rows and their recipes
    python benchmarks/accuracy.py --markdown RESULTS.json             the tables of a results file
    python benchmarks/accuracy.py --write docs/results.md             refreshes the tables of a page

A row is quantized into a temporary folder, loaded back, and compared with the original on the same
windows. The calibration text is cut so that zq takes just the wanted tokens, window after window; this is
checked. Each row is saved as soon as it is there, and a second call with the same --out measures only
what is missing or has another recipe now.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pages
import torch
from protocol import KEY, Cost, Results, Setting, add_arguments, commit_of, environment, setting
from rows import LKD, SCHEMES, TEXT, Row, Tokens, ablation_rows, method_rows, scale_rows

import zq
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan


def chosen_rows(args: argparse.Namespace) -> list[tuple[Row, int]]:
    """(row, seed) in order: --only, then every seed for those that --seeded names, the first for the rest."""
    tokens = Tokens(args.samples, args.length, args.generated)
    if args.ablation:
        rows = ablation_rows(tokens, args.scheme)
    else:
        rows = scale_rows() if args.scales else method_rows(tokens)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    return [
        (row, seed)
        for row in rows
        if re.search(args.only, row.name)
        for seed in (seeds if re.search(args.seeded, row.name) else seeds[:1])
    ]


def measure(row: Row, seed: int, where: Setting, text: str) -> dict[str, Any]:
    """Quantize and evaluate; `text` is the path of the calibration text."""
    recipe = row.recipe(seed, text)
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        with Cost(where.device) as cost:
            plan = make_plan(where.folder, recipe, device=where.device)
            report = quantize(plan, out).report
        if row.calibrated and (plan.windows is None or not torch.equal(plan.windows, where.calibration)):
            raise SystemExit(f"row '{row.name}' was calibrated on other tokens than the protocol's")
        del plan
        measured = where.measure(lambda: zq.load(str(out), device=where.device, kernels=False))
    return {
        "bits_per_weight": report["bits_per_weight"],
        **cost.to_dict(),
        "seconds_of": report["seconds_of"],
        **measured,
        "calibration": report["calibration"],
        "held_out_loss": report["held_out_loss"],
    }


def run(args: argparse.Namespace) -> int:
    """The number of rows that failed."""
    chosen = chosen_rows(args)
    where = setting(args)
    if where.calibration is None and any(row.calibrated for row, _ in chosen):
        raise SystemExit("rows that calibrate need --calibration FILE; or choose others with --only")
    results = Results(args.out, environment(args.device), where.protocol)
    failed, commit = 0, commit_of(args.commit)
    with tempfile.TemporaryDirectory() as scratch:
        text = args.keep_calibration or Path(scratch) / TEXT
        text.write_text(where.slice, encoding="utf-8", newline="")
        for row, seed in chosen:
            place = dict(zip(KEY, (row.table, row.scheme, row.method, seed), strict=True))
            if results.find(**place, recipe=row.yaml):
                continue
            try:
                # The same recipe may stand in two tables.
                found = results.find(recipe=row.yaml, seed=seed) or measure(row, seed, where, str(text))
            except (ZqError, torch.OutOfMemoryError) as error:
                print(f"{row.name}, seed {seed}: {error}", flush=True)
                failed += 1
                continue
            results.add({"recipe": row.yaml, "commit": commit} | found | place)
            kls = ", ".join(f"{name} {m['kl']:.4f}" for name, m in found["texts"].items())
            print(f"{row.name}, seed {seed}: KL {kls}; {found['seconds']:.0f} s", flush=True)
    if not args.out:
        print(pages.all_tables(results.document))
    return failed


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_arguments(parser)
    parser.add_argument("--generated", type=int, default=896, help="windows that the model writes, for lkd")
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--seeded", default=".*", help="regex: rows that run with every seed")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--ablation", action="store_true", help=f"one switch changed at a time in {LKD}")
    group.add_argument("--scales", action="store_true", help="the shipped schemes, rounded to nearest")
    parser.add_argument("--scheme", default="w4a16 g64", choices=SCHEMES, help="of the ablation")
    parser.add_argument("--keep-calibration", type=Path, metavar="FILE", help=f"write {TEXT} there")
    parser.add_argument("--show", action="store_true", help="print the rows and their recipes, do nothing")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the tables of these results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="refresh the tables of a page")
    args = parser.parse_args()
    if args.show:
        for row, seed in chosen_rows(args):
            print(f"# {row.name}, seed {seed}\n{row.yaml}seed: {seed}\n")
    elif args.markdown:
        print(pages.all_tables(json.loads(args.markdown.read_text(encoding="utf-8"))))
    elif args.write:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(pages.refreshed(page), encoding="utf-8")
    elif failed := run(args):
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
