"""Peak memory and time of layer-by-layer distillation: at two depths, and for the shape of an 8B model.

    python benchmarks/memory.py depth --device cuda --out benchmarks/results/depth.json
    python benchmarks/memory.py large --device cuda --out benchmarks/results/large.json
    python benchmarks/memory.py states --device cuda --out benchmarks/results/states.json

depth   a random Llama of hidden size 1024 with 4 and with 16 blocks: if the peaks are alike, memory does not
        depend on depth
large   the shape of Llama-3-8B with 4 of its 32 blocks, random weights, written piece by piece: seconds per
        block and peak memory of rtn, gptq and lkd
states  one block of the shape of Llama-3-70B by lkd as published, the states of its AdamW in 32, 8 and 4 bits

Every row is a process of its own, so peaks do not mix. What the whole depth would take is extrapolated: a
block takes the mean of all but the first, what the first took longer happens once, writing windows and
reading back grow with the number of blocks, and reading the text, embeddings and head are counted once.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import torch
import yaml
from protocol import KEY, Cost, Results, commit_of, environment
from rows import LKD, START, Steps
from transformers import LlamaConfig, LlamaForCausalLM

from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe

SHAPES = {
    "depth": {"hidden": 1024, "inner": 2816, "heads": 16, "kv_heads": 4, "vocabulary": 8192},
    "large": {"hidden": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "states": {"hidden": 8192, "inner": 28672, "heads": 64, "kv_heads": 8, "vocabulary": 1024},
}
DEPTH = 32  # blocks of Llama-3-8B
SCHEMES = {"w4a16 g128": {"weights": "int4:g128"}}
SCHEMES["w4a8 g128"] = {"weights": "int4:g128", "activations": "int8:token"}
CHUNK = 1 << 24  # weights that are drawn at once


def config(shape: dict[str, int], blocks: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=blocks,
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )


def write_random(folder: Path, shape: dict[str, int], blocks: int) -> int:
    """A bf16 checkpoint with weights of a standard deviation of 0.02 and norms of ones; at most CHUNK of them
    are in memory. Returns its bytes."""
    folder.mkdir()
    made = config(shape, blocks)
    made.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in LlamaForCausalLM(made).named_parameters()}
    header, end = {}, 0
    for name, dims in shapes.items():
        begin, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for dims in shapes.values():
            for first in range(0, math.prod(dims), CHUNK):
                count = min(CHUNK, math.prod(dims) - first)
                drawn = torch.randn(count, generator=generator) * 0.02 if len(dims) > 1 else torch.ones(count)
                file.write(drawn.bfloat16().view(torch.uint8).numpy().tobytes())
    return 8 + len(text) + end


def measured(source: Path, recipe: str, device: str) -> dict[str, Any]:
    """One run in this process: peaks, seconds, and seconds by part."""
    marks: list[tuple[str, float]] = []
    written = 0.0

    def note(event: dict[str, Any]) -> None:
        nonlocal written
        if "unit" in event:
            marks.append((event["unit"], time.perf_counter()))
        elif "written" in event:
            written = time.perf_counter()

    with tempfile.TemporaryDirectory() as scratch, Cost(device) as cost:
        begun = time.perf_counter()
        plan = make_plan(source, Recipe.parse(recipe), device=device)
        planned = time.perf_counter()
        quantize(plan, Path(scratch) / "out", progress=note)
        ended = time.perf_counter()
    times = [written or planned, *(t for _, t in marks)]
    spent = [(name, times[i + 1] - times[i]) for i, (name, _) in enumerate(marks)]
    parts = {
        "blocks": [t for name, t in spent if name not in ("outside", "tail")],
        "once": planned - begun + sum(t for name, t in spent if name in ("outside", "tail")),
        "with_depth": (written or planned) - planned + ended - times[-1],
    }
    return {**cost.to_dict(), "parts": parts}


def extrapolated(parts: dict[str, Any], depth: int) -> tuple[float, float, float]:
    """(seconds per block, outside of the blocks, of a model of `depth` blocks); see the top of the file."""
    first, *rest = parts["blocks"]
    rest = rest or [first]
    per_block = sum(rest) / len(rest)
    outside = parts["once"] + max(0.0, first - per_block) + parts["with_depth"] * depth / len(parts["blocks"])
    return per_block, outside, outside + depth * per_block


def runs(args: argparse.Namespace) -> Iterator[tuple[str, str, int, dict[str, Any], Steps]]:
    """(scheme, method, blocks, calibration, steps)."""
    tokens = {"source": "random", "samples": args.samples, "length": args.length}
    lkd = [
        {n: o | ({"iterations": args.iterations} if n == "lkd" else {}) for n, o in s.items()} for s in LKD
    ]
    if args.mode == "depth":
        for blocks in args.blocks:
            yield "w4a16 g128", f"lkd, {blocks} blocks", blocks, tokens, lkd
        return
    (blocks,) = args.blocks
    if args.mode == "states":
        for bits in (32, 8, 4):
            learned = {"iterations": args.iterations, "batch": 8, "optimizer": {"bits": bits}}
            yield "w4a16 g128", f"{bits}-bit states", blocks, tokens, [{"lkd-classic": learned}]
        return
    for scheme in SCHEMES:
        yield scheme, "rtn", blocks, {"source": "none"}, [{"rtn": {"scale": "mse"}}]
        yield scheme, "gptq", blocks, tokens, START
        yield scheme, "lkd", blocks, tokens | {"generated": args.generated}, lkd


def run(args: argparse.Namespace) -> Results:
    shape = SHAPES[args.mode] | {k: v for k in SHAPES[args.mode] if (v := getattr(args, k)) is not None}
    protocol = {"shape": shape, "samples": args.samples, "length": args.length, "iterations": args.iterations}
    results = Results(args.out, environment(args.device), protocol)
    commit = commit_of(args.commit)
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        for scheme, method, blocks, calibration, steps in runs(args):
            if not re.search(args.only, f"{scheme} {method}"):
                continue
            place = dict(zip(KEY, (args.mode, scheme, method, 0), strict=True))
            data = {"rules": [{"match": "*", **SCHEMES[scheme]}], "steps": steps, "calibration": calibration}
            recipe = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=110)
            if results.find(**place, recipe=recipe):
                continue
            source = Path(scratch) / str(blocks)
            if not source.exists():
                write_random(source, shape, blocks)
            worker = [sys.executable, __file__, "worker", str(source), recipe, "--device", args.device]
            done = subprocess.run(worker, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{scheme} {method} failed", flush=True)
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            per_block, outside, whole = extrapolated(found["parts"], DEPTH)
            windows = calibration.get("samples", 0) + calibration.get("generated", 0)
            row = (
                place
                | found
                | {
                    "recipe": recipe,
                    "commit": commit,
                    "blocks": blocks,
                    "checkpoint_bytes": (source / "model.safetensors").stat().st_size,
                    "tokens": windows * calibration.get("length", 0),
                    "seconds_per_block": round(per_block, 3),
                    "seconds_outside": round(outside, 2),
                    "seconds_extrapolated": round(whole, 1),
                    "blocks_extrapolated": DEPTH,
                }
            )
            results.add(row)
            print(f"{scheme} {method}: {found['seconds']:.0f} s", flush=True)
    return results


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="mode", required=True)
    for mode, shape in SHAPES.items():
        command = commands.add_parser(mode)
        large = mode == "large"
        blocks = {"depth": [4, 16], "large": [4], "states": [1]}[mode]
        command.add_argument("--device", default="cpu")
        command.add_argument("--blocks", type=int, nargs="+", default=blocks)
        command.add_argument("--samples", type=int, default=128 if large else 32)
        command.add_argument("--length", type=int, default=1024 if large else 256)
        command.add_argument("--iterations", type=int, default=400 if large else 20, help="of lkd")
        command.add_argument(
            "--generated", type=int, default=0, help="windows that the model writes, for lkd"
        )
        command.add_argument("--scratch", type=Path, help="where the checkpoints are written")
        command.add_argument("--only", default=".*", help="regex over schemes and methods: 'w4a8 g128 lkd'")
        command.add_argument("--out", type=Path)
        command.add_argument("--commit")
        for key in shape:
            command.add_argument(f"--{key}", type=int)
    worker = commands.add_parser("worker")
    worker.add_argument("source", type=Path)
    worker.add_argument("recipe")
    worker.add_argument("--device")
    args = parser.parse_args()
    if args.mode == "worker":
        print(json.dumps(measured(args.source, args.recipe, args.device)))
    else:
        print(pages.all_tables(run(args).document))


if __name__ == "__main__":
    main()
