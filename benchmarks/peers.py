"""AutoRound and llm-compressor by the protocol of accuracy.py, wherever they are installed.

    python benchmarks/peers.py demo --calibration FILE --text handbook=FILE --text cpp=FILE --device cuda
           --out benchmarks/results/peers.json [--only REGEX] [--iterations 200]
    python benchmarks/peers.py ... --written --only AutoRound         on what zq's default calibrates on
    python benchmarks/peers.py --show                                 the rows

They are no dependencies of zq: `pip install auto-round llmcompressor`, in an environment of its own. The
API is that of auto-round 0.15.1 and llm-compressor 0.14.0.1. Both get the calibration tokens of the
protocol, quantize all linear layers but lm_head (symmetric integers, groups of 64, activations per
token), and what they leave in memory, activations quantized, is compared with the original. With --written
AutoRound gets the windows that the model writes besides, as zq's row `lkd` does, so that method and data can
be told apart; the seconds of their writing are added. A row that fails is said and left out.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pages
import torch
from protocol import KEY, Cost, Results, Setting, add_arguments, commit_of, environment, setting
from rows import TEXT, Tokens
from written import default_windows

import zq

GROUP = 64
PACKAGES = {"auto_round": "auto-round", "llmcompressor": "llmcompressor"}
# What a package does to the model, which is on the CPU and is returned quantized.
Run = Callable[[Setting, Any, int], Any]


@dataclass(frozen=True)
class Row:
    scheme: str
    method: str
    package: str
    run: Run

    @property
    def name(self) -> str:
        return f"peers {self.scheme} {self.method}"


def rows(iterations: int, written: int = 0) -> list[Row]:
    """The rows of the table, whether their package is installed or not; with `written` windows that the model
    writes there are only AutoRound's."""
    found = []
    more = f", {written} written windows" if written else ""
    for scheme, weights, activations in (("w4a16 g64", 4, 16), ("w4a8 g64", 4, 8), ("w3 g64", 3, 16)):
        arguments = {"weights": weights, "activations": activations}
        tuned = partial(autoround, iterations=iterations, **arguments)
        found.append(Row(scheme, f"AutoRound, {iterations} iterations{more}", "auto_round", tuned))
        if written:
            continue
        found.append(
            Row(scheme, "GPTQ, llm-compressor", "llmcompressor", partial(compressor, ["gptq"], **arguments))
        )
        if activations == 16:
            awq = partial(compressor, ["awq", "rtn"], **arguments)
            found.append(Row(scheme, "AWQ, llm-compressor", "llmcompressor", awq))
    if written:
        return found
    smooth = partial(compressor, ["smoothquant", "gptq"], weights=8, activations=8, group=None)
    found.append(Row("w8a8", "SmoothQuant .8 + GPTQ, llm-compressor", "llmcompressor", smooth))
    return found


def autoround(
    where: Setting, model: Any, seed: int, *, weights: int, activations: int, iterations: int
) -> Any:
    """AutoRound's defaults (batches of 8 windows, rate 1 / iterations) but for tokens, group and device."""
    assert where.calibration is not None
    tuned = import_module("auto_round").AutoRound(
        model,
        where.tokenizer,
        scheme="W4A16",
        bits=weights,
        group_size=GROUP,
        sym=True,
        act_bits=activations,
        **({"act_group_size": -1, "act_dynamic": True} if activations < 16 else {}),
        iters=iterations,
        nsamples=len(where.calibration),
        seqlen=where.calibration.shape[1],
        dataset=[window[None] for window in where.calibration],
        batch_size=8,
        device_map=where.device,
        seed=seed,
    )
    return tuned.quantize()[0]


def compressor(
    steps: list[str],
    where: Setting,
    model: Any,
    seed: int,
    *,
    weights: int,
    activations: int,
    group: int | None = GROUP,
) -> Any:
    """llm-compressor's `oneshot` with the defaults of its modifiers. It has no use for a seed, and works on
    the accelerator where there is one (its AWQ nowhere else)."""
    from compressed_tensors.offload import remove_dispatch
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    assert where.calibration is not None
    layout = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(num_bits=weights, type="int", symmetric=True, **layout),
        input_activations=QuantizationArgs(
            num_bits=activations, type="int", symmetric=True, strategy="token", dynamic=True
        )
        if activations < 16
        else None,
    )
    quantized = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    modifiers = {
        "smoothquant": lambda: SmoothQuantModifier(smoothing_strength=0.8),
        "awq": AWQModifier,
        "gptq": lambda: GPTQModifier(**quantized),
        "rtn": lambda: QuantizationModifier(**quantized),
    }
    windows = [{"input_ids": w[None], "attention_mask": torch.ones_like(w)[None]} for w in where.calibration]
    quantized_model = oneshot(
        model=model,
        tokenizer=where.tokenizer,
        recipe=[modifiers[step]() for step in steps],
        dataset=torch.utils.data.DataLoader(windows, batch_size=None),
        num_calibration_samples=len(windows),
        max_seq_length=where.calibration.shape[1],
    )
    return remove_dispatch(quantized_model)


def measure(row: Row, where: Setting, seed: int, writing: dict[str, Any] | None = None) -> dict[str, Any]:
    """Quantize and evaluate; seconds are those of the package's own call, and of `writing` windows before."""
    torch.manual_seed(seed)
    model = zq.load(str(where.folder), device="cpu")
    with Cost(where.device) as cost:
        quantized = row.run(where, model, seed)
    spent = cost.to_dict()
    if writing is not None:
        spent["seconds"] = round(spent["seconds"] + writing["seconds"], 2)
        spent["seconds_of"] = {"windows": writing["seconds"], "quantize": round(cost.seconds, 2)}
    return {**spent, **where.measure(lambda: quantized.to(where.device))}


def with_written(where: Setting, generated: int) -> tuple[Setting, dict[str, Any]]:
    """(the setting with the windows that zq's row `lkd` calibrates on, seed 0; what writing them cost)."""
    assert where.calibration is not None
    samples, length = where.calibration.shape
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / TEXT
        text.write_text(where.slice, encoding="utf-8", newline="")
        windows, piece = default_windows(where, str(text), Tokens(samples, length, generated), seed=0)
    return replace(where, calibration=windows), piece.cost


def versions() -> dict[str, str]:
    found = {}
    for package in (*PACKAGES.values(), "compressed-tensors"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add_arguments(parser)
    parser.add_argument("--iterations", type=int, default=200, help="of AutoRound")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--written", action="store_true", help="AutoRound on the default windows of zq")
    parser.add_argument("--generated", type=int, default=896, help="windows that the model writes, of those")
    parser.add_argument("--show", action="store_true", help="print the rows, do nothing")
    args = parser.parse_args()
    chosen = [
        row for row in rows(args.iterations, args.generated * args.written) if re.search(args.only, row.name)
    ]
    if args.show:
        print("\n".join(row.name for row in chosen))
        return
    missing = {row.package for row in chosen if PACKAGES[row.package] not in versions()}
    for package in sorted(missing):
        print(f"no rows of {PACKAGES[package]}: it is not installed; pip install {PACKAGES[package]}")
    where = setting(args)
    if where.calibration is None:
        raise SystemExit("every row calibrates: give --calibration FILE")
    results = Results(args.out, environment(args.device, **versions()), where.protocol)
    commit, writing = commit_of(args.commit), None
    if args.written and "auto_round" not in missing:
        where, writing = with_written(where, args.generated)
    for row in chosen:
        place = dict(zip(KEY, ("peers", row.scheme, row.method, args.seed), strict=True))
        if row.package in missing or results.find(**place):
            continue
        try:
            measured = measure(row, where, args.seed, writing)
        except Exception as error:  # of somebody else's code: any type
            print(f"{row.name} failed: {type(error).__name__}: {error}", flush=True)
            continue
        results.add({"commit": commit} | measured | place)
        print(f"{row.name}: mean KL {measured['mean_kl']:.4f}", flush=True)
    if not args.out and results.rows:
        print(pages.all_tables(results.document))


if __name__ == "__main__":
    main()
