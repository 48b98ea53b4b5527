"""What travels along with the weights, and the model card."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.simulate import recipe
from tests.tiny import save_tiny
from zq.errors import OutputError
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.publish import model_card

TRAVEL = {
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ x }}",
    "vocab.txt": "a",
    "spiece.model": "b",
    "LICENSE": "c",
    "modules.json": json.dumps(
        [{"path": p} for p in ("", "1_Pooling", "2_Dense", "../other", "/etc", ".git")]
    ),
    "1_Pooling/config.json": "{}",
    "2_Dense/config.json": "{}",
    "2_Dense/model.safetensors": "weights",
    "2_Dense/deep/er/file.bin": "x",
    "additional_chat_templates/tool_use.jinja": "{{ y }}",
}
STAY = {
    "pytorch_model.bin": "x",
    "model.onnx": "x",
    "model.safetensors.index.json.bak": "x",
    "pytorch_model.bin.index.json": "{}",
    ".gitattributes": "x",
    "run.py": "x",
    "onnx/config.json": "{}",
    "additional_chat_templates/notes.txt": "x",
    "2_Dense/.hidden": "x",
    ".zq-complete.json": "{}",
    ".git/config.json": "{}",
    "../other/config.json": "{}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "my-model"
    save_tiny("llama", folder)
    for name, text in (TRAVEL | STAY).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    card = "---\nlicense: mit\nlanguage: [en]\nwidget: x\n---\n# Model\n"
    (folder / "README.md").write_text(card)
    return folder


def test_what_travels_and_what_stays(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(make_plan(source, recipe("* = int4:g32")), out)
    files = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert files == {*TRAVEL, "config.json", "model.safetensors", "zq_report.json", "README.md"}
    assert {p.name for p in tmp_path.iterdir()} == {"my-model", "other", "out"}
    for name, text in TRAVEL.items():
        if name != "generation_config.json":
            assert (out / name).read_text() == text
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert after == before


@pytest.mark.parametrize(("rules", "needs_zq"), [("* = int4:g32", False), ("* = e2m1fn:b64", True)])
def test_the_card_says_what_it_is_and_how_it_was_made(
    rules: str, needs_zq: bool, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    plan = make_plan(source, recipe(rules))
    report = quantize(plan, out, command="zq quantize my-model -o out").report
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "my-model",
        "language": ["en"],
        "library_name": "transformers",
        "license": "mit",
        "tags": ["zq", plan.format],
    }
    assert "zq quantize my-model -o out" in body
    assert str(plan.recipe).strip() in body
    assert f"{report['bits_per_weight']:.3f}" in body
    assert ("import zq" in body) == needs_zq
    assert "SentenceTransformer(" in body, "the source has modules.json"
    assert ("decompress_model" in body) == (not needs_zq)
    assert str(tmp_path) not in card, "no path of the machine"


CARD = "---\nlicense: mit\nbase_model: org/parent\n---\n"


@pytest.mark.parametrize(
    ("place", "card", "base", "title"),
    [
        ("models--org--my-model/snapshots/0123abcd", CARD, "org/my-model", "my-model"),
        ("models--org--my-model/snapshots/0123abcd", "", "org/my-model", "my-model"),
        ("models--old/snapshots/0123abcd", CARD, "old", "old"),
        ("local", CARD, "org/parent", "local"),
        ("local", "", "local", "local"),
    ],
)
def test_the_card_names_the_model_that_was_quantized(
    place: str, card: str, base: str, title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / place
    save_tiny("llama", folder)
    (folder / "README.md").write_text(card)
    monkeypatch.chdir(folder)  # a relative path has no name of its own
    plan = make_plan(Path("."), recipe("* = int4:g32"))
    report = quantize(plan, tmp_path / "out").report
    _, front, body = model_card(plan, report).split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == base
    assert body.startswith(f"# {title}, quantized by zq ")
    assert "SentenceTransformer" not in body


def test_a_disk_that_fills_up_while_publishing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    out, plan = tmp_path / "out", make_plan(source, recipe("* = int4:g32"))
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OutputError, match="no space left for"):
        quantize(plan, out)
    assert not list(out.glob("*.safetensors"))
    monkeypatch.undo()
    quantize(plan, out, resume=True)
    assert (out / "model.safetensors").is_file()
