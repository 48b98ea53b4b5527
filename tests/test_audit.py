"""What the audit must notice: one changed byte anywhere, tensors swapped, a config that says otherwise."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import zq.pipeline
from tests.simulate import recipe
from tests.tiny import save_tiny
from zq.audit import audit, audit_folder
from zq.errors import AuditError
from zq.export import compressed_tensors
from zq.pipeline import quantize
from zq.plan import Plan, make_plan
from zq.recipe import Recipe

UP = "model.layers.1.mlp.up_proj"
GATE = "model.layers.1.mlp.gate_proj"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_tiny("llama", folder, torch.bfloat16)
    return folder


def span(file: Path, name: str) -> tuple[int, int]:
    """Where a tensor's bytes are in a safetensors file."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    start, stop = json.loads(data[8 : 8 + length])[name]["data_offsets"]
    return 8 + length + start, 8 + length + stop


def patch(file: Path, at: int, new: bytes) -> None:
    with open(file, "r+b") as out:
        out.seek(at)
        out.write(new)


def flip(name: str, byte: int = 5) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        at = span(file, name)[0] + byte
        patch(file, at, bytes([file.read_bytes()[at] ^ 1]))

    return corrupt


def fill(name: str, value: float) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        patch(file, span(file, name)[0], torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes())

    return corrupt


def swap(first: str, second: str) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        data, a, b = file.read_bytes(), span(file, first), span(file, second)
        patch(file, a[0], data[b[0] : b[1]])
        patch(file, b[0], data[a[0] : a[1]])

    return corrupt


def rename(name: str) -> Callable[[Path], None]:
    def corrupt(file: Path) -> None:
        data = file.read_bytes()
        patch(file, data.index(f'"{name}"'.encode()) + 1, b"X")

    return corrupt


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-8])


CORRUPTIONS = {
    "a code": ("* = int4:g32", flip(f"{UP}.weight_packed"), f"{UP}"),
    "an int8 weight": ("* = int8:channel @ int8:token", flip(f"{UP}.weight"), UP),
    "an fp8 weight": ("* = e4m3fn:channel", flip(f"{UP}.weight"), UP),
    "a scale": ("* = int4:g32", flip(f"{UP}.weight_scale", 0), UP),
    "a zero scale": ("* = int4:g32", fill(f"{UP}.weight_scale", 0.0), f"'{UP}.weight_scale' holds a scale"),
    "a NaN scale": ("* = int4:g32", fill(f"{UP}.weight_scale", float("nan")), f"'{UP}.weight_scale'"),
    "a negative scale": ("* = int4:g32", fill(f"{UP}.weight_scale", -1.0), UP),
    "a zero point": ("* = int4:g32:asym", flip(f"{UP}.weight_zero_point"), UP),
    "a shape": ("* = int4:g32", flip(f"{UP}.weight_shape", 0), UP),
    "a sub-scale": ("* = int4:g32:two-level:s=fp32", flip(f"{UP}.weight_sub"), UP),
    "a product of scales": ("* = int4:g32:two-level", flip(f"{UP}.weight_scale", 0), UP),
    "a scale of one level": (
        "* = int4:g32:two-level",
        fill(f"{UP}.weight_scale", 1e-6),
        f"layer '{UP}' does not unpack: '{UP}.weight_scale' is not integers times one scale per channel",
    ),
    "a block scale": ("* = e2m1fn:b64", fill(f"{UP}.weight_scale", 0.0), f"'{UP}.weight_scale'"),
    "a norm": ("* = int4:g32", flip(NORM), f"'{NORM}'"),
    "two weights": ("* = int4:g32", swap(f"{UP}.weight_packed", f"{GATE}.weight_packed"), "_proj"),
    "two norms": (
        "* = int4:g32",
        swap("model.layers.0.input_layernorm.weight", "model.layers.1.input_layernorm.weight"),
        "input_layernorm.weight'",
    ),
    "a name": ("* = int4:g32", rename(NORM), NORM[1:]),
    "the end": ("* = int4:g32", truncate, "model.safetensors"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_corruption_between_writing_and_audit(
    case: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules, corrupt, words = CORRUPTIONS[case]
    out = tmp_path / "out"

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        corrupt(folder / "model.safetensors")
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError) as caught:
        quantize(make_plan(source, recipe(rules)), out)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert [p.name for p in out.iterdir()] == [".zq-job"], "nothing is published"


def test_a_codes_change_that_keeps_the_hash_list_is_still_noticed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dequantized weight is compared with the run's, not only bytes with bytes."""
    name = f"{UP}.weight_packed"

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        file = folder / "model.safetensors"
        flip(name)(file)
        start, stop = span(file, name)
        done["1"]["tensors"][name] = hashlib.sha256(file.read_bytes()[start:stop]).hexdigest()
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError, match=f"the weight of '{UP}' read from disk"):
        quantize(make_plan(source, recipe("* = int4:g32")), tmp_path / "out")


FOLDED = "model.layers.1.input_layernorm.weight"


def smoothed() -> Recipe:
    return Recipe.parse(str(recipe("* = int8:channel")).replace("steps:\n", "steps:\n- smoothquant: {}\n"))


def test_a_folded_norm_is_checked_by_its_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        assert FOLDED in done["1"]["changed"]
        flip(FOLDED)(folder / "model.safetensors")
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError, match=f"the bytes of tensor '{FOLDED}' on disk"):
        quantize(make_plan(source, smoothed()), tmp_path / "out")


def test_a_folded_norm_is_checked_by_what_was_measured(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the original norm in its place, hash and all, is not what the run computed with."""

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        file = folder / "model.safetensors"
        start, stop = span(file, FOLDED)
        old = load_file(source / "model.safetensors")[FOLDED].view(torch.uint8).numpy().tobytes()
        assert old != file.read_bytes()[start:stop]
        patch(file, start, old)
        done["1"]["tensors"][FOLDED] = hashlib.sha256(old).hexdigest()
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError, match=f"'{FOLDED}' read from disk is not what the run measured with"):
        quantize(make_plan(source, smoothed()), tmp_path / "out")


@pytest.mark.parametrize("say", [False, True])
def test_no_step_changes_what_the_plan_does_not_name(
    say: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last norm, changed and hashed as changed; with `say`, the run even claims that a step did it."""

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        file = folder / "model.safetensors"
        flip(NORM)(file)
        start, stop = span(file, NORM)
        digest = hashlib.sha256(file.read_bytes()[start:stop]).hexdigest()
        done["tail"]["tensors"][NORM] = digest
        if say:
            done["tail"]["changed"][NORM] = digest
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    words = "was changed, which no step of the plan may do" if say else "was to be copied unchanged"
    with pytest.raises(AuditError, match=f"'{NORM}' {words}"):
        quantize(make_plan(source, smoothed()), tmp_path / "out")


def test_a_config_that_would_be_read_differently(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = compressed_tensors.config
    monkeypatch.setattr(compressed_tensors, "config", lambda assigned, skipped: real(assigned, []))
    with pytest.raises(
        AuditError, match=r"config\.json would give 'lm_head' the scheme int4:g32 instead of None"
    ):
        quantize(make_plan(source, recipe("* = int4:g32")), tmp_path / "out")


@pytest.mark.parametrize(
    ("rules", "shard"), [("* = int4:g32 @ int8:token", 10**9), ("* = e2m1fn:b64", 30_000)]
)
def test_a_published_folder_is_checked_against_its_report(
    rules: str, shard: int, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = quantize(make_plan(source, recipe(rules), shard_bytes=shard), out).report
    assert audit_folder(out) == {"passed": True, "tensors": len(report["tensors"])}
    assert report["audit"]["tensors"] == len(report["tensors"])
    assert report["audit"]["quantized_layers"] == 14
    file = next(f for f in sorted(out.glob("*.safetensors")) if UP.encode() in f.read_bytes())
    flip(f"{UP}.weight_packed")(file)
    with pytest.raises(AuditError, match=f"{UP}.weight_packed"):
        audit_folder(out)


def test_a_changed_scale_of_a_group_of_zeros_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It multiplies zeros only, so the weight is the same, but the bytes are not what was written."""
    source = tmp_path / "in"
    save_tiny("llama", source, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors[f"{UP}.weight"][0] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})

    def corrupted(plan: Plan, folder: Path, done: dict) -> dict:
        fill(f"{UP}.weight_scale", 2.0)(folder / "model.safetensors")
        return audit(plan, folder, done)

    monkeypatch.setattr(zq.pipeline, "audit", corrupted)
    with pytest.raises(AuditError, match=f"the bytes of tensor '{UP}.weight_scale' on disk"):
        quantize(make_plan(source, recipe("* = int4:g32")), tmp_path / "out")
