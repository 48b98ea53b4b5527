"""Perplexity, KL divergence and cost of zq's methods: each row is a full run of the pipeline.

    python benchmarks/accuracy.py demo --calibration FILE --text handbook=FILE --text c++=FILE
           --device cuda --out benchmarks/results/methods-smollm2-h200.json [--only REGEX] [--seeds 0,1,2]
           [--ablation [--scheme 'w3 g64'] | --scales]
           [--devices cuda:0,cuda:0,cuda:1 --minutes 9] [--rows benchmarks/open.txt]
    python benchmarks/accuracy.py --show [--ablation | --scales]      the rows and their recipes
    python benchmarks/accuracy.py --merge NEW.json --out RESULTS.json
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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pages
import torch
from protocol import KEY, Cost, Results, Setting, add_arguments, commit_of, environment, setting
from rows import LKD, SCHEMES, TEXT, Row, Tokens, ablation_rows, method_rows, scale_rows
from spread import spread
from written import Written, added, with_written

import zq
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan

Task = tuple[Row, int]  # with its seed


def chosen_rows(args: argparse.Namespace) -> list[Task]:
    """(row, seed) in order: --only, then every seed for those that --seeded names, the first for the rest."""
    tokens = Tokens(args.samples, args.length, args.generated)
    if args.rows:
        return listed(args.rows.read_text(encoding="utf-8"), tokens)
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


def listed(text: str, tokens: Tokens) -> list[Task]:
    """What a list asks for, in its order: on each line seeds and a regex over the names of all tables."""
    rows = [*method_rows(tokens), *scale_rows(), *(r for s in SCHEMES for r in ablation_rows(tokens, s))]
    found: dict[Task, None] = {}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        seeds, _, wanted = line.partition(" ")
        matching = [row for row in rows if re.search(wanted.strip(), row.name)]
        if not matching:
            raise SystemExit(f"no row is named like '{wanted.strip()}'; see --show")
        found |= dict.fromkeys((row, int(seed)) for row in matching for seed in seeds.split(","))
    return list(found)


@dataclass
class Bench:
    """What a process measures rows with; `text` is the path of the calibration text."""

    where: Setting
    text: str
    written: Written


def begin(args: argparse.Namespace, text: str, device: str) -> Bench:
    args.device = device
    return Bench(setting(args), text, Written())


def measure(row: Row, seed: int, bench: Bench) -> dict[str, Any]:
    """Quantize and evaluate."""
    where, recipe = bench.where, row.recipe(seed, bench.text)
    piece = bench.written.of(make_plan(where.folder, recipe, device=where.device))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        with Cost(where.device) as cost:
            plan = with_written(make_plan(where.folder, recipe, device=where.device), piece)
            report = quantize(plan, out).report
        if row.calibrated and (plan.windows is None or not torch.equal(plan.windows, where.calibration)):
            raise SystemExit(f"row '{row.name}' was calibrated on other tokens than the protocol's")
        del plan
        measured = where.measure(lambda: zq.load(str(out), device=where.device, kernels=False))
    spent = cost.to_dict() | {"seconds_of": report["seconds_of"]}
    return {
        "bits_per_weight": report["bits_per_weight"],
        **(added(spent, piece) if piece else spent),
        **measured,
        "calibration": report["calibration"],
        "held_out_loss": report["held_out_loss"],
    }


def attempt(bench: Bench, task: Task) -> dict[str, Any] | str:
    """A row, or why there is none."""
    try:
        return measure(*task, bench)
    except (ZqError, torch.OutOfMemoryError) as error:
        return str(error)


def outcomes(
    tasks: list[Task], args: argparse.Namespace, bench: Bench
) -> Iterator[tuple[Task, dict[str, Any] | str]]:
    if not args.devices:
        yield from ((task, attempt(bench, task)) for task in tasks)
        return
    limit = args.minutes and 60 * args.minutes
    ready = partial(begin, args, bench.text)
    for task, found, beside in spread(tasks, args.devices.split(","), ready, attempt, limit):
        yield task, found if isinstance(found, str) or not beside else found | {"beside": beside}


def run(args: argparse.Namespace) -> int:
    """The number of rows that failed."""
    chosen = chosen_rows(args)
    if args.devices:
        args.device = args.devices.split(",")[0].partition(":")[0]
    where = setting(args)
    if where.calibration is None and any(row.calibrated for row, _ in chosen):
        raise SystemExit("rows that calibrate need --calibration FILE; or choose others with --only")
    results = Results(args.out, environment(args.device), where.protocol)
    failed, commit = 0, commit_of(args.commit)
    # The same recipe may stand in two tables: it is measured once.
    places: dict[tuple[str, int], list[Row]] = {}
    for row, seed in chosen:
        place = dict(zip(KEY, (row.table, row.scheme, row.method, seed), strict=True))
        if results.find(**place, recipe=row.yaml):
            continue
        if same := results.find(recipe=row.yaml, seed=seed):
            results.add(same | place)
            continue
        places.setdefault((row.yaml, seed), []).append(row)
    tasks = [(rows[0], seed) for (_, seed), rows in places.items()]
    with tempfile.TemporaryDirectory() as scratch:
        text = args.keep_calibration or Path(scratch) / TEXT
        text.write_text(where.slice, encoding="utf-8", newline="")
        for (first, seed), found in outcomes(tasks, args, Bench(where, str(text), Written())):
            if isinstance(found, str):
                print(f"{first.name}, seed {seed}: {found}", flush=True)
                failed += 1
                continue
            for row in places[first.yaml, seed]:
                place = dict(zip(KEY, (row.table, row.scheme, row.method, seed), strict=True))
                results.add({"recipe": row.yaml, "commit": commit} | found | place)
            kls = ", ".join(f"{name} {m['kl']:.4f}" for name, m in found["texts"].items())
            print(f"{first.name}, seed {seed}: KL {kls}; {found['seconds']:.0f} s", flush=True)
    if not args.out:
        print(pages.all_tables(results.document))
    return failed


def merge(files: list[Path], out: Path | None) -> None:
    """The rows of all `files` into `out`, in the place of rows with the same key. Exits where a file has been
    made elsewhere or by another protocol."""
    if out is None:
        raise SystemExit("--merge needs --out: the file that the rows go into")
    for file in files:
        document = json.loads(file.read_text(encoding="utf-8"))
        results = Results(out, document["environment"], document["protocol"])
        for row in document["rows"]:
            results.add(row)
        print(f"{len(document['rows'])} rows of {file}")


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
    group.add_argument("--rows", type=Path, metavar="LIST", help="a file: a line is seeds and a regex")
    parser.add_argument("--devices", help="a process for each: cuda:0,cuda:0,cuda:1; a row is for one")
    parser.add_argument("--minutes", type=float, help="of --devices: what is not finished then is dropped")
    parser.add_argument(
        "--merge", type=Path, nargs="+", metavar="JSON", help="put the rows of these results into --out"
    )
    parser.add_argument("--keep-calibration", type=Path, metavar="FILE", help=f"write {TEXT} there")
    parser.add_argument("--show", action="store_true", help="print the rows and their recipes, do nothing")
    parser.add_argument("--markdown", type=Path, metavar="JSON", help="print the tables of these results")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="refresh the tables of a page")
    args = parser.parse_args()
    if args.show:
        for row, seed in chosen_rows(args):
            print(f"# {row.name}, seed {seed}\n{row.yaml}seed: {seed}\n")
    elif args.merge:
        merge(args.merge, args.out)
    elif args.markdown:
        print(pages.all_tables(json.loads(args.markdown.read_text(encoding="utf-8"))))
    elif args.write:
        page = args.write.read_text(encoding="utf-8")
        args.write.write_text(pages.refreshed(page), encoding="utf-8")
    elif failed := run(args):
        raise SystemExit(f"{failed} rows failed")


if __name__ == "__main__":
    main()
