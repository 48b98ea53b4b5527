"""The situations of docs/errors.md: for each row's id, a function that puts the bad input in place.

The command of a row runs in a folder of its own, where the function has made MODEL (a tiny Llama with a
tokenizer, then broken), OUT, TEXT or RECIPE.yaml. What the command says and how it exits is in the
table, and only there: tests/test_errors.py compares, tools/errors_table.py rewrites.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import shlex
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.command import Done, run, spawn
from tests.letters import save_tokenizer
from tests.simulate import stop_after
from tests.tiny import TINY, build_tiny, random_model

TABLE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ANYTHING = "…"  # in the table: text of another program, which its versions may word differently

# Rows that run as real processes, some with a limit in bytes: of any file (a full disk), of all memory.
PROCESSES: dict[str, tuple[int, int] | None] = {
    "kernels-no-compiler": None,
    "sweep-task": None,
    "no-scheme": None,
    "hub-offline": None,
    "audit-failed": None,
    "disk-full": (resource.RLIMIT_FSIZE, 100_000),
    "disk-full-later": (resource.RLIMIT_FSIZE, 200_000),
    "out-of-memory": (resource.RLIMIT_AS, 15 << 30),
}
# Rows after which the output folder is there, because what is done is kept.
KEPT = {"disk-full-later"}


@dataclass(frozen=True)
class Row:
    """One row of the table: what is wrong, the command, the line that it prints, its exit code."""

    id: str
    what: str
    command: str
    error: str
    exit: int

    def __str__(self) -> str:
        error = self.error.replace("|", "\\|")
        return f"| {self.id} | {self.what} | `{self.command}` | {error} | {self.exit} |"

    def run(self, folder: Path) -> Done:
        """Run the command in `folder`, which must be the current directory."""
        words = shlex.split(self.command)
        env = dict(word.split("=", 1) for word in words[: words.index("zq")])
        args = words[words.index("zq") + 1 :]
        if self.id not in PROCESSES:
            return run(*args, env=env)
        kind, limit = PROCESSES[self.id] or (resource.RLIMIT_FSIZE, None)
        before = resource.getrlimit(kind)
        if limit:  # inherited by the child; only the soft limit, so that it can be taken back
            resource.setrlimit(kind, (limit, before[1]))
        try:
            return spawn(*args, cwd=folder, env=env)
        finally:
            resource.setrlimit(kind, before)

    def expects(self, line: str) -> bool:
        """Whether `line` is the error of the table."""
        parts = map(re.escape, f"error: {self.error}".split(ANYTHING))
        return re.fullmatch(".*".join(parts), line) is not None


def read_table(path: Path = TABLE) -> list[Row]:
    """The rows, in order."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
        if len(cells) == 5 and cells[4].isdigit():
            rows.append(Row(cells[0], cells[1], cells[2].strip("`"), cells[3], int(cells[4])))
    return rows


def error_lines(done: Done) -> list[str]:
    return [line for line in done.err.splitlines() if line.startswith("error:")]


class Model:
    """A tiny Llama with a tokenizer in `folder`, to be broken."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held: list[int] = []

    def __del__(self) -> None:
        for handle in self.held:
            os.close(handle)

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def config(self, **changes: Any) -> None:
        path = self.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def change(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        """Rewrite the weights after `change` has edited the dict of tensors."""
        tensors = load_file(self.weights)
        change(tensors)
        save_file(tensors, self.weights, metadata={"format": "pt"})

    def split(self) -> dict[str, str]:
        """The same weights in two shards and an index; returns the weight map."""
        tensors = load_file(self.weights)
        names = sorted(tensors)
        weight_map = {}
        for i, part in enumerate((names[:10], names[10:]), start=1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({name: tensors[name] for name in part}, self.folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(part, file)
        self.weights.unlink()
        self.index(weight_map)
        return weight_map

    def index(self, weight_map: dict[str, str]) -> None:
        (self.folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def save_model(folder: Path, name: str = "llama") -> None:
    """What `Model` starts from."""
    build_tiny(name).save_pretrained(folder)
    save_tokenizer(folder)


SITUATIONS: dict[str, Callable[[Model], None]] = {}


def situation(
    *ids: str,
) -> Callable[[Callable[[Model], None]], Callable[[Model], None]]:
    def register(build: Callable[[Model], None]) -> Callable[[Model], None]:
        SITUATIONS.update(dict.fromkeys(ids, build))
        return build

    return register


@situation(
    *(
        "no-output",
        "no-scheme",
        "two-schemes",
        "unknown-recipe",
        "unknown-preset",
        "recipe-file-missing",
        "calibration-missing",
        "written-too-short",
    ),
    *("unknown-option", "not-a-number", "bad-seed", "bad-shard-size", "unknown-device", "missing-device"),
    *("no-such-folder", "group-size-text", "group-size-unused", "group-size-too-odd", "output-below-file"),
    *("output-unwritable", "resume-nothing", "no-report", "disk-full", "disk-full-later", "hub-offline"),
    *("bits-gptq", "bits-out-of-reach", "bits-not-integers", "bits-no-text", "bits-not-a-budget"),
    *("to-unknown", "gptq-activations", "fp8-holds", "export-unknown", "export-float"),
    *(
        "gguf-tokenizer",
        "engine-unknown",
        "engine-part",
        "engine-twice",
        "gguf-below-file",
        "engine-refuses",
        "doctor-float",
        "serve-engine",
    ),
    *("kernels-arch", "kernels-arch-quantize", "kernels-not-quantized", "kernels-output"),
    *("sweep-no-output", "sweep-bits", "sweep-types", "sweep-blocks", "sweep-nothing", "sweep-seeds"),
    *("sweep-twice", "sweep-length", "sweep-device"),
    *("bench-nothing", "bench-both", "bench-shape", "bench-no-scheme", "bench-own-scheme", "bench-compile"),
    *("bench-shape-against", "bench-batch", "bench-length", "bench-positions", "bench-mode", "bench-decoder"),
    *("bench-dtype", "bench-device", "bench-plot", "bench-plot-folder", "bench-json"),
    *("window-too-long", "bad-start", "prompt-too-long", "prompt-empty", "no-chat-template", "bad-kv"),
    "generate-bad-kv",
)
def healthy(model: Model) -> None:
    """The input is fine; the command is not, or the place."""


@situation("missing-shard")
def missing_shard(model: Model) -> None:
    model.split()
    (model.folder / "model-00002-of-00002.safetensors").unlink()


@situation("missing-tensor")
def missing_tensor(model: Model) -> None:
    model.change(lambda tensors: tensors.pop(Q_PROJ))


@situation("broken-promise")
def broken_promise(model: Model) -> None:
    model.index(model.split() | {"model.extra.weight": "model-00001-of-00002.safetensors"})


@situation("truncated-shard")
def truncated_shard(model: Model) -> None:
    data = model.weights.read_bytes()
    model.weights.write_bytes(data[: len(data) // 2])


@situation("huge-header")
def huge_header(model: Model) -> None:
    model.weights.write_bytes(struct.pack("<Q", 1 << 60) + model.weights.read_bytes()[8:])


@situation("not-safetensors")
def not_safetensors(model: Model) -> None:
    model.weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@situation("path-escape")
def path_escape(model: Model) -> None:
    model.index(model.split() | {Q_PROJ: "../other/model.safetensors"})


@situation("broken-index")
def broken_index(model: Model) -> None:
    (model.folder / INDEX).write_text('{"metadata": {}}')


@situation("two-layouts")
def two_layouts(model: Model) -> None:
    data = model.weights.read_bytes()
    model.split()
    model.weights.write_bytes(data)


@situation("bin-only")
def bin_only(model: Model) -> None:
    model.weights.rename(model.folder / "pytorch_model.bin")


@situation("no-weights")
def no_weights(model: Model) -> None:
    model.weights.unlink()


@situation("int8-weight")
def int8_weight(model: Model) -> None:
    model.change(lambda tensors: tensors.update({Q_PROJ: torch.ones(64, 64, dtype=torch.int8)}))


@situation("float64-weight")
def float64_weight(model: Model) -> None:
    model.change(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].double()}))


@situation("float64-model")
def float64_model(model: Model) -> None:
    model.change(lambda tensors: tensors.update({name: t.double() for name, t in tensors.items()}))


def _poison(value: float, name: str) -> Callable[[Model], None]:
    def build(model: Model) -> None:
        model.change(lambda tensors: tensors[name].view(-1)[7].fill_(value))

    return build


SITUATIONS["nan-weight"] = _poison(float("nan"), Q_PROJ)
SITUATIONS["inf-weight"] = _poison(float("inf"), Q_PROJ)
SITUATIONS["nan-norm"] = _poison(float("nan"), "model.norm.weight")


@situation("shape-mismatch")
def shape_mismatch(model: Model) -> None:
    model.config(vocab_size=161)


@situation("lost-blocks")
def lost_blocks(model: Model) -> None:
    model.config(num_hidden_layers=1)


@situation("overflow")
def overflow(model: Model) -> None:
    model.change(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    model.change(lambda t: t.update({Q_PROJ: torch.full_like(t[Q_PROJ], -65472.0)}))
    rule = 'rules: [{match: "*", weights: "int4:g32"}]\nsteps: [{rtn: {scale: absmax}}]\n'
    Path("RECIPE.yaml").write_text(rule)


def _overflowing(step: str) -> Callable[[Model], None]:
    """The activations of the first block leave the range of float16."""

    def build(model: Model) -> None:
        model.change(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
        names = [f"model.layers.0.mlp.{name}.weight" for name in ("up_proj", "down_proj")]
        model.change(lambda t: t.update({name: t[name] * 2000 for name in names}))
        rule = 'rules: [{match: "*", weights: "int4:g32"}]\ncalibration: {source: random}\n'
        Path("RECIPE.yaml").write_text(f"{rule}steps: [{step}]\n")

    return build


SITUATIONS["gptq-overflow"] = _overflowing("gptq")
SITUATIONS["classic-overflow"] = _overflowing("lkd-classic: {iterations: 2}")


@situation("classic-diverges")
def classic_diverges(model: Model) -> None:
    model.change(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    rule = 'rules: [{match: "*", weights: "int4:g32"}]\ncalibration: {source: random}\n'
    Path("RECIPE.yaml").write_text(f"{rule}steps: [lkd-classic: {{rate: 1.0, decay: 0.0}}]\n")


@situation("no-scale-fits")
def no_scale_fits(model: Model) -> None:
    model.change(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    model.change(
        lambda t: t.update({Q_PROJ.replace("q_proj", "v_proj"): torch.full((32, 64), 60000.0).half()})
    )
    rule = 'rules: [{match: "*", weights: "int8:channel"}]\nsteps: [{smoothquant: {}}, {rtn: {}}]\n'
    Path("RECIPE.yaml").write_text(rule)


@situation("config-nested")
def config_nested(model: Model) -> None:
    (model.folder / "config.json").write_text("[" * 100_000)


@situation("no-config")
def no_config(model: Model) -> None:
    (model.folder / "config.json").unlink()


@situation("config-not-json")
def config_not_json(model: Model) -> None:
    (model.folder / "config.json").write_text('{"model_type": "llama",')


@situation("config-contradiction")
def config_contradiction(model: Model) -> None:
    model.config(hidden_act="nope")


@situation("unknown-model-type")
def unknown_model_type(model: Model) -> None:
    model.config(model_type="mamba")


@situation("remote-code")
def remote_code(model: Model) -> None:
    model.config(
        architectures=["MyForCausalLM"], auto_map={"AutoModelForCausalLM": "modeling_my.MyForCausalLM"}
    )


@situation("already-quantized")
def already_quantized(model: Model) -> None:
    model.config(quantization_config={"quant_method": "bitsandbytes", "bits": 4})


@situation("foreign-quantization")
def foreign_quantization(model: Model) -> None:
    already_quantized(model)


@situation("no-tokenizer")
def no_tokenizer(model: Model) -> None:
    for file in model.folder.glob("tokenizer*"):
        file.unlink()


@situation("foreign-tokenizer")
def foreign_tokenizer(model: Model) -> None:
    save_tokenizer(model.folder, start=1000)


@situation("calibration-too-short", "evaluation-too-short")
def short_text(model: Model) -> None:
    Path("TEXT").write_text("Too short to learn anything from.")


@situation("not-utf8")
def not_utf8(model: Model) -> None:
    Path("TEXT").write_bytes("Grüße aus Köln".encode("latin-1"))


@situation("output-not-empty", "sweep-elsewhere")
def output_not_empty(model: Model) -> None:
    Path("OUT").mkdir()
    Path("OUT", "notes").write_text("mine")


@situation("output-is-file")
def output_is_file(model: Model) -> None:
    Path("OUT").write_text("mine")


@situation("encoder-eval", "encoder-generate", "sweep-encoder", "encoder-kv", "bench-encoder")
def encoder(model: Model) -> None:
    shutil.rmtree(model.folder)
    save_model(model.folder, "bert")


@situation("no-head-eval", "no-head-generate")
def base_only(model: Model) -> None:
    shutil.rmtree(model.folder)
    build_tiny("llama").base_model.save_pretrained(model.folder)
    save_tokenizer(model.folder)


@situation("other-kind", "bench-other")
def other_kind(model: Model) -> None:
    save_model(Path("OTHER"), "bert")


def _recipe(text: str) -> Callable[[Model], None]:
    def build(model: Model) -> None:
        Path("RECIPE.yaml").write_text(text)

    return build


RULE = 'rules:\n  - {match: "*", weights: "int8:channel"}\n'
RECIPES = {
    "bad-yaml": 'rules:\n  - match: "*\n',
    "not-a-recipe": "- one\n- two\n",
    "yaml-nested": "{" * 2000 + "}" * 2000 + "\n",
    "too-many-tokens": RULE + "calibration: {samples: 1000000000000}\n",
    "unknown-key": RULE + "budget: 4\n",
    "wrong-type": RULE + "seed: many\n",
    "no-rules": "about: nothing\n",
    "rule-never-applies": RULE + '  - {match: "@mlp", weights: "int8:channel"}\n',
    "rule-matches-nothing": 'rules:\n  - {match: "*.c_fc", weights: "int8:channel"}\n',
    "all-skipped": 'rules:\n  - {match: "*", skip: true}\n',
    "unknown-preset-in-recipe": RULE + "preset: fast\n",
    "unknown-step": RULE + "steps:\n  - magic: {}\n",
    "steps-in-wrong-order": RULE + "steps:\n  - rtn: {}\n  - awq: {}\n",
    "option-out-of-range": RULE + "steps:\n  - smoothquant: {alpha: 1.5}\n  - rtn: {}\n",
    "unknown-step-option": RULE + "steps:\n  - rtn: {speed: 9}\n",
    "steps-two-quantizers": RULE + "steps:\n  - rtn: {}\n  - gptq: {}\n",
    "steps-no-quantizer": RULE + "steps:\n  - awq: {}\n",
    "lkd-first": RULE + "steps:\n  - lkd: {}\n",
    "lkd-few-windows": RULE + "steps:\n  - rtn: {}\n  - lkd: {}\ncalibration: {source: random, samples: 8}\n",
    "out-of-memory": RULE
    + "steps:\n  - lkd-classic: {batch: 1048576}\n"
    + "calibration: {source: random, samples: 1048576, length: 64}\n",
    "bits-one-width": 'rules: [{match: "*", weights: "int4:g32:asym"}]\ncalibration: {source: random}\n',
    "lorc-not-last": RULE + "steps:\n  - lorc: {}\n  - rtn: {}\n",
    "lorc-rank": RULE + "steps:\n  - rtn: {}\n  - lorc: {rank: 33}\n",
    "proxy-late": RULE + "steps:\n  - rtn: {}\n  - proxy: {}\n",
    "proxy-nothing": RULE + "steps:\n  - proxy: {share: 0.001}\n  - rtn: {}\n",
    "proxy-in-rule": 'rules:\n  - {match: "*", weights: "int4:g32:keep=8"}\n',
    "format-without-sign": 'rules:\n  - {match: "*", weights: "udynamic4:b64"}\n',
    "inner-groups": 'rules:\n  - {match: "*", weights: "int4:b64:pow2=48"}\n',
    "inner-groups-asym": 'rules:\n  - {match: "*", weights: "int4:b64:asym:pow2=16"}\n',
    "plugin-refuses": 'rules:\n  - {match: "*", weights: "int4:b64"}\nformat: zq\n',
    "center-asym": 'rules:\n  - {match: "*", weights: "int4:b64:asym:center"}\n',
    "rank1-center": 'rules:\n  - {match: "*", weights: "int4:rank1:center"}\n',
    "optimizer-keys": RULE + "steps:\n  - lkd-classic: {optimizer: {bit: 8}}\n",
    "optimizer-bits": RULE + "steps:\n  - lkd-classic: {optimizer: {bits: 16}}\n",
    "optimizer-of-lkd": RULE + "steps:\n  - rtn: {}\n  - lkd: {optimizer: {bits: 8}}\n",
    "lorc-in-rule": 'rules:\n  - {match: "*", weights: "int4:g32:lorc=8"}\n',
    "lorc-not-expressible": RULE + "steps:\n  - rtn: {}\n  - lorc: {}\nformat: compressed-tensors\n",
    "gptq-mixed": 'rules:\n  - {match: "@mlp", weights: "int4:g32"}\n  - {match: "*", weights: "int8:g32"}\n',
    "bench-skipped": 'rules:\n  - {match: "*", skip: true}\n',
    "sweep-budget": RULE + "bits: 5\n",
    "bits-no-number": RULE + "bits: many\n",
    "bits-widths": RULE + "bits: {mean: 5, widths: [4, 9]}\n",
    "bits-width-not-held": RULE.replace('int8:channel"', 'int4:channel", activations: e4m3fn:token')
    + "bits: {mean: 8, widths: [8]}\ncalibration: {source: random}\n"
    "format: compressed-tensors\n",
    "bad-option-value": RULE + "steps:\n  - rtn: {scale: best}\n",
    "unknown-number-format": 'rules:\n  - {match: "*", weights: "int9:channel"}\n',
    "unknown-layout": 'rules:\n  - {match: "*", weights: "int4:row"}\n',
    "unsupported-activations": 'rules:\n  - {match: "*", weights: "int4:g64", activations: "int4:token"}\n',
    "yaml-tag": RULE + "about: !!python/name:os.system\n",
    "extends-twice": "extends: BASE.yaml\n",
    "not-expressible": 'format: compressed-tensors\nrules:\n  - {match: "*", weights: "e2m1fn:b64"}\n',
    "rotate-late": RULE + "steps:\n  - rtn: {}\n  - rotate: {}\n",
    "rotate-nothing": RULE + "steps:\n  - rotate: {r1: false, r2: false}\n  - rtn: {}\n",
    "kernels-none": 'rules:\n  - {match: "*", weights: "int3:g32"}\ncalibration: {source: none}\n',
    "tied-head": RULE + '  - {match: lm_head, weights: "int8:channel"}\n',
}
SITUATIONS |= {name: _recipe(text) for name, text in RECIPES.items()}


@situation("extends-twice")
def extends_twice(model: Model) -> None:
    _recipe(RECIPES["extends-twice"])(model)
    Path("BASE.yaml").write_text("extends: w8a8\n")


@situation("tied-head")
def tied_head(model: Model) -> None:
    _recipe(RECIPES["tied-head"])(model)
    save_model(model.folder, "llama-tied")


ROTATE = RULE + "steps:\n  - rotate: {}\n  - rtn: {}\ncalibration: {source: none}\n"


def _rotate(name: str = "llama", change: Callable[[Model], None] | None = None) -> Callable[[Model], None]:
    def build(model: Model) -> None:
        _recipe(ROTATE)(model)
        save_model(model.folder, name)
        if change:
            change(model)

    return build


SITUATIONS["rotate-family"] = _rotate("gpt2")
SITUATIONS["rotate-nan"] = _rotate(change=_poison(float("nan"), "model.norm.weight"))


@situation("rotate-no-head")
def rotate_no_head(model: Model) -> None:
    base_only(model)
    _recipe(ROTATE)(model)


@situation("rotate-no-hadamard")
def rotate_no_hadamard(model: Model) -> None:
    _recipe(ROTATE)(model)
    shutil.rmtree(model.folder)
    sizes = {"hidden_size": 188, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 94}
    config = TINY["llama"]()
    random_model(type(config)(**config.to_dict() | sizes)).save_pretrained(model.folder)


@situation("rotate-dtype")
def rotate_dtype(model: Model) -> None:
    _recipe(ROTATE)(model)
    name = "model.embed_tokens.weight"
    model.change(lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))


@situation("rotate-overflow")
def rotate_overflow(model: Model) -> None:
    """Each of the two tensors is finite; their product is not."""
    _recipe(ROTATE)(model)
    model.change(lambda t: t.update({name: tensor.half() for name, tensor in t.items()}))
    model.change(lambda t: (t["lm_head.weight"].fill_(3e4), t["model.norm.weight"].fill_(3e4)))


@situation("audit-untied")
def audit_untied(model: Model) -> None:
    """OUT is a finished output of a rotated model; its config.json was edited since."""
    _recipe(ROTATE)(model)
    run("quantize", model.folder, "--recipe", "RECIPE.yaml", "-o", "OUT").ok()
    path = Path("OUT", "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


@situation("job-in-output", "resume-other-recipe", "resume-other-bits")
def interrupted_job(model: Model) -> None:
    """OUT holds a `--w8a8 --calib random` run that was stopped after two units."""
    from zq.pipeline import quantize
    from zq.plan import make_plan
    from zq.recipe import load

    recipe = load("w8a8")
    recipe = replace(recipe, calibration=replace(recipe.calibration, source="random"))

    try:
        quantize(make_plan(model.folder, recipe), Path("OUT"), progress=stop_after(2))
    except KeyboardInterrupt:
        return
    raise AssertionError("the run was not interrupted")


@situation("resume-other-model")
def other_model(model: Model) -> None:
    interrupted_job(model)
    model.change(lambda tensors: tensors["model.norm.weight"].mul_(2))


@situation("audit-failed")
def audit_failed(model: Model) -> None:
    """OUT is a finished output in which one byte of a weight has changed since."""
    run("quantize", model.folder, "--w8a8", "--calib", "random", "-o", "OUT").ok()
    path = Path("OUT", WEIGHTS)
    data = bytearray(path.read_bytes())
    header = struct.unpack("<Q", data[:8])[0]
    entries = json.loads(data[8 : 8 + header])
    data[8 + header + entries[Q_PROJ]["data_offsets"][0] + 5] ^= 1
    path.write_bytes(data)


@situation("audit-config")
def audit_config(model: Model) -> None:
    """OUT is a finished output whose config.json was edited since."""
    run("quantize", model.folder, "--w8a8", "--calib", "random", "-o", "OUT").ok()
    path = Path("OUT", "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["ignore"] = []
    path.write_text(json.dumps(config))


@situation("not-two-level")
def not_two_level(model: Model) -> None:
    """OUT is a finished output of free group scales whose config.json was edited to say two-level."""
    run("quantize", model.folder, "--w4a8", "--calib", "random", "-o", "OUT").ok()
    path = Path("OUT", "config.json")
    config = json.loads(path.read_text())
    config["quantization_config"]["zq"] = {"two_level": ["group_0"]}
    path.write_text(json.dumps(config))


def _quantized(*options: str) -> Callable[[Model], None]:
    """OUT is a finished output."""

    def build(model: Model) -> None:
        run("quantize", model.folder, *options, "--calib", "none", "-o", "OUT").ok()

    return build


situation("export-not-expressible")(_quantized("--w8a8"))
situation("export-same-format", "export-inside", "gguf-name", "serve-host", "serve-nothing")(
    _quantized("--w4a16")
)


@situation("export-scales")
def export_scales(model: Model) -> None:
    Path("RECIPE.yaml").write_text('rules:\n  - {match: "*", weights: "int4:g32:s=fp32"}\n')
    _quantized("--recipe", "RECIPE.yaml")(model)


@situation("gguf-input")
def gguf_input(model: Model) -> None:
    Path("MODEL.gguf").write_bytes(b"GGUF")


def _config_changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Model], None]:
    """OUT is a finished W4A8 output whose quantization_config was changed."""

    def build(model: Model) -> None:
        _quantized("--w4a8")(model)
        path = Path("OUT", "config.json")
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))

    return build


def _group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


situation("method-no-name")(_config_changed(lambda config: config.update(quant_method=["gptq"])))
situation("scheme-strategy")(_config_changed(lambda config: _group(config)["weights"].update(strategy="row")))
situation("scheme-bits")(_config_changed(lambda config: _group(config)["weights"].update(num_bits="4")))
situation("scheme-activations")(_config_changed(lambda config: _group(config).update(input_activations=[])))
situation("two-level-of-nothing")(_config_changed(lambda config: config.update(zq={"two_level": ["nope"]})))
situation("scheme-no-weights")(_config_changed(lambda config: _group(config).update(weights=None)))
situation("scheme-as-bytes")(_config_changed(lambda config: _group(config).update(format="int-quantized")))
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def _fp8(**fields: Any) -> Callable[[Model], None]:
    """OUT says that another tool made it, with these fields."""
    return _config_changed(lambda config: (config.clear(), config.update(FP8 | fields)))


situation("fp8-tiles")(_fp8(weight_block_size=[64, 64]))
situation("fp8-static")(_fp8(activation_scheme="static"))
situation("fp8-powers")(_fp8(scale_fmt="ue8m0"))
situation("fp8-parts")(_fp8(modules_to_not_convert=["lm_head", "down_proj"]))
situation("fp8-fused")(_fp8(modules_to_not_convert=["lm_head", "model.layers.0.mlp.gate_up_proj"]))
situation("fp8-pattern")(_fp8(modules_to_not_convert=["lm_head", "model.layers.*"]))
situation("fp8-head")(_fp8(modules_to_not_convert=["model.norm"]))
situation("scheme-static")(
    _config_changed(lambda config: _group(config)["input_activations"].update(dynamic=False))
)


def _tensors_changed(change: Callable[[torch.Tensor], torch.Tensor], suffix: str) -> Callable[[Model], None]:
    """OUT is a finished W4A8 output whose tensors of this name were changed."""

    def build(model: Model) -> None:
        _quantized("--w4a8")(model)
        path = Path("OUT", WEIGHTS)
        tensors = load_file(path)
        tensors |= {name: change(tensor) for name, tensor in tensors.items() if name.endswith(suffix)}
        save_file(tensors, path, metadata={"format": "pt"})

    return build


situation("codes-as-floats", "eval-dtype")(_tensors_changed(lambda codes: codes.float(), ".weight_packed"))
situation("scales-not-finite")(_tensors_changed(lambda scales: scales * float("nan"), ".weight_scale"))


@situation("act-order")
def act_order(model: Model) -> None:
    """OUT is a GPTQ checkpoint whose groups were made along an order of activations."""
    run("quantize", model.folder, "--w4a16", "--calib", "none", "--to", "gptq", "-o", "OUT").ok()
    path = Path("OUT", WEIGHTS)
    tensors = load_file(path)
    name = "model.layers.0.mlp.down_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


@situation("kernels-no-compiler")
def no_compiler(model: Model) -> None:
    """A package `cuda` without bindings lies in the current folder, where `python -m` looks first."""
    Path("cuda").mkdir()
    Path("cuda", "__init__.py").touch()


@situation("resume-in-use")
def in_use(model: Model) -> None:
    """Another process, here this one, works in OUT: it holds the lock until the command has ended."""
    interrupted_job(model)
    handle = os.open(Path("OUT", ".zq-job", "lock"), os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    model.held.append(handle)


@situation("lost-tensor")
def lost_tensor(model: Model) -> None:
    """OUT is a finished output whose weights were replaced by those of the original."""
    run("quantize", model.folder, "--w8a8", "--calib", "random", "-o", "OUT").ok()
    shutil.copyfile(model.weights, Path("OUT", WEIGHTS))


@situation("bench-quantized")
def quantized_original(model: Model) -> None:
    run("quantize", model.folder, "--w8a8", "--calib", "random", "-o", "OUT").ok()


@situation("bench-broken")
def broken_weights(model: Model) -> None:
    model.change(lambda tensors: tensors.pop(Q_PROJ))


@situation("sweep-task")
def other_harness(model: Model) -> None:
    """A package `lm_eval` without tasks lies in the current folder, where `python -m` looks first."""
    Path("lm_eval").mkdir()
    Path("lm_eval", "__init__.py").touch()
    Path("lm_eval", "tasks.py").write_text(
        "class TaskManager:\n    all_tasks = ()\n\n\ndef get_task_dict(names, manager): ...\n"
    )


@situation("sweep-other-setting")
def finished_sweep(model: Model) -> None:
    """OUT holds a sweep on 2 windows."""
    grid = ("--bits", "4", "--types", "int", "--blocks", "64", "--devices", "cpu")
    run("sweep", model.folder, *grid, "--windows", "2", "--length", "16", "-o", "OUT").ok()


@situation("sweep-damaged")
def damaged_sweep(model: Model) -> None:
    Path("OUT").mkdir()
    Path("OUT", "results.jsonl").write_text("{broken\n")


@situation("sweep-in-use")
def sweep_in_use(model: Model) -> None:
    """Another process, here this one, holds the lock until the command has ended."""
    Path("OUT").mkdir()
    handle = os.open(Path("OUT", "results.jsonl"), os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    model.held.append(handle)
