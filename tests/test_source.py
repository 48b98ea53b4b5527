"""What is fetched from the hub: the files of one checkpoint, and no second copy of its weights."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from zq.errors import ZqError
from zq.source import resolve

WANTED = {
    "config.json",
    "generation_config.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer.model",
    "1_Pooling/config.json",
    "LICENSE.txt",
    "README.md",
}
UNWANTED = {
    "consolidated.safetensors",
    "consolidated.safetensors.index.json",
    "consolidated-00001-of-00002.safetensors",
    "original/consolidated.00.pth",
    "original/params.json",
    "metal/model.bin",
    "onnx/model.onnx",
    "onnx/config.json",
    "openvino/openvino_model.xml",
    "checkpoint-100/model.safetensors",
    "pytorch_model.bin",
}


def test_only_one_copy_of_the_weights_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[dict] = []

    def download(model: str, **options) -> str:
        assert model == "some/model"
        asked.append(options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("some/model") == tmp_path
    assert set(filter_repo_objects(WANTED | UNWANTED, **asked[0])) == WANTED


@pytest.mark.parametrize("name", ["", " "])
def test_no_name(name: str) -> None:
    with pytest.raises(ZqError, match="the name of the model is empty"):
        resolve(name)
