"""Everything in an output folder beside the weights: config, tokenizer, report, model card.

The weights are moved last, so a folder that has them is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from zq.audit import REPORT
from zq.checkpoint.writer import ShardWriter, disk_error, write_atomic
from zq.plan import Plan

COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
COMPANIONS += ("additional_chat_templates/*.jinja",)
NOT_COMPANIONS = ("config.json", REPORT)
# compressed-tensors unpacks in a hook of the model's call, and sentence-transformers calls its forward.
UNPACK = """encoder = model[0].auto_model
encoder.hf_quantizer.compressor.decompress_model(encoder)  # sentence-transformers from 5.4 on does not"""


def publish(plan: Plan, writer: ShardWriter, out: Path, report: dict[str, Any]) -> None:
    """Write what lies beside the weights of a run, then move its shards into `out`."""
    settings = {**plan.view.settings, "quantization_config": plan.quantization_config}
    write_beside(companions(plan.folder), plan.folder, out, settings, report, model_card(plan, report))
    writer.publish(out)


def write_beside(
    files: list[Path], folder: Path, out: Path, settings: dict[str, Any], report: dict[str, Any], card: str
) -> None:
    """Copy `files` of `folder` to `out`, and write config.json with `settings` changed, the report and the
    card there. Raises ZqError (disk)."""
    for file in files:
        target = out / file.relative_to(folder)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        except OSError as error:
            raise disk_error(error, target, 0) from None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | settings
    write_atomic(out / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / REPORT, json.dumps(report, indent=1, allow_nan=False) + "\n")
    write_atomic(out / "README.md", card)


def companions(folder: Path) -> list[Path]:
    """Tokenizer, generation config, chat templates, licence: what travels with a checkpoint unchanged.

    Of the subfolders, those that sentence-transformers' modules.json lists: they are parts of the model.
    """
    found = {file for pattern in COMPANIONS for file in folder.glob(pattern)}
    for module in _modules(folder):
        found |= set((folder / module).rglob("*"))
    return sorted(
        file
        for file in found
        if file.is_file()
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")  # of weights that do not travel along
        and file.relative_to(folder).as_posix() not in NOT_COMPANIONS
    )


def _modules(folder: Path) -> list[str]:
    """Subfolders that modules.json lists; none that lead out of the checkpoint."""
    try:
        entries = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [entry["path"] for entry in entries]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    inside = re.compile(r"[^./][^/]*(/[^./][^/]*)*")
    return [str(PurePosixPath(p)) for p in paths if isinstance(p, str) and inside.fullmatch(p.rstrip("/"))]


def hub_id(folder: Path) -> str | None:
    """The id of a model in the hub's cache (models--ORG--NAME/snapshots/COMMIT); None of any other folder."""
    path = Path(os.path.abspath(folder))
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--"):
        return cache.removeprefix("models--").replace("--", "/")
    return None


def model_card(plan: Plan, report: dict[str, Any]) -> str:
    """README.md of the output: what it is, what it cost, how to load it, how to make it again."""
    hub, name = hub_id(plan.folder), Path(os.path.abspath(plan.folder)).name
    front = {"base_model": name, **front_matter(plan.folder)}
    front |= {"library_name": "transformers", "tags": ["zq", plan.format]}
    if hub:  # its card says what that model was made of, which is one step too far back
        front["base_model"], name = hub, hub.rpartition("/")[2]
    schemes = sorted({str(scheme) for scheme in plan.assigned.values()})
    errors = list(report["output_error"].values())
    rows = [
        ("linear layers quantized", f"{len(plan.assigned)} of {len(plan.layers)}"),
        ("schemes", ", ".join(f"`{s}`" for s in schemes)),
        (
            "size of the weights",
            f"{report['bytes_before'] / 1e6:.1f} MB → {report['bytes_after'] / 1e6:.1f} MB",
        ),
        ("bits per quantized weight, as written", f"{report['bits_per_weight']:.3f}"),
        *((f"weight SQNR, {kind}", f"{db:.2f} dB") for kind, db in report["weight_sqnr_db"].items()),
    ]
    if "rotated" in report:
        sizes = (
            f"{name.upper()} [{size} x {size}]" for name in ("r1", "r2") if (size := report["rotated"][name])
        )
        rows.append(("rotations folded into the weights", ", ".join(sizes)))
    if errors:
        last = "not measurable: activations overflow" if errors[-1] is None else f"{errors[-1]:.4f}"
        rows.append(("relative squared error after the last block", last))
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    headless = plan.skeleton.model.get_output_embeddings() is None
    auto = "AutoModel" if plan.skeleton.arch.encoder or headless else "AutoModelForCausalLM"
    return f"""---
{yaml.safe_dump(front, sort_keys=True, allow_unicode=True).strip()}
---
# {name}, quantized by zq {report["zq"]}

| | |
|---|---|
{table}

The figures are of the run that made this folder; `{REPORT}` has those of every layer, and hashes.

{how_to_use(plan.folder, auto, plan.format, report["command"] or "zq.pipeline.quantize")}

with the recipe

```yaml
{report["recipe"].strip()}
```
"""


def how_to_use(folder: Path, auto: str, format: str, command: str) -> str:
    """The end of a card: how to load a checkpoint of this format with the class `auto`, and with
    sentence-transformers where `folder`, its source, is a model of that; and what made it."""
    extra = "import zq  # registers the format\n" if format == "zq" else ""
    ways = [f'{extra}from transformers import {auto}\nmodel = {auto}.from_pretrained("THIS FOLDER")']
    if (folder / "modules.json").is_file():
        unpack = "\n" + UNPACK if format == "compressed-tensors" else ""
        name = "SentenceTransformer"
        ways.append(f'{extra}from sentence_transformers import {name}\nmodel = {name}("THIS FOLDER"){unpack}')
    loading = "\n\n".join(f"```python\n{way}\n```" for way in ways)
    return f"""{loading}

Made by

```
{command}
```"""


def front_matter(folder: Path) -> dict[str, Any]:
    """The licence that the source's card states; a quantized model keeps it. And what it was made of."""
    card = folder / "README.md"
    if not card.is_file():
        return {}
    text = card.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n"):
        return {}
    try:
        data = yaml.safe_load(text[4:].partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    kept = ("license", "license_name", "license_link", "language", "base_model")
    return {key: data[key] for key in kept if isinstance(data, dict) and key in data}
