"""A W8A8 encoder in sentence-transformers, as the model card says: what its own modules make of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import zq
from tests.command import run
from zq.eval.encoder import mean_pool
from zq.runtime.linear import QuantLinear

sentence_transformers = pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is missing"
)
pytestmark = pytest.mark.demo

SENTENCES = ["The cat sits on the mat.", "A cat is sitting on a rug.", "Interest rates rose again."]
FORMATS = ("compressed-tensors", "zq")


@pytest.fixture(scope="module")
def encoders(minilm_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """MiniLM in W8A8, by format."""
    home = tmp_path_factory.mktemp("w8a8")
    first, second = FORMATS
    run("quantize", minilm_model, "--w8a8", "--calib", "none", "-o", home / first).ok()
    run("export", home / first, "--to", second, "-o", home / second).ok()
    return {format: home / format for format in FORMATS}


def by_the_card(folder: Path) -> Any:
    """The model that the code on the checkpoint's card loads."""
    code = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[-1]
    assert "SentenceTransformer" in code
    names: dict[str, Any] = {}
    exec(code.replace("THIS FOLDER", str(folder)), names)
    return names["model"].to("cpu")


def embed(model: Any) -> torch.Tensor:
    """Unit vectors [sentence, hidden], float32."""
    return model.encode(SENTENCES, convert_to_tensor=True, normalize_embeddings=True).cpu()


@pytest.mark.parametrize("format", FORMATS)
def test_what_the_card_loads(format: str, encoders: dict[str, Path], minilm_model: Path) -> None:
    found = embed(by_the_card(encoders[format]))
    model = sentence_transformers.SentenceTransformer(str(minilm_model), device="cpu")
    close = (found * embed(model)).sum(-1)
    assert close.min() > 0.99
    assert close.max() < 0.9999, "nothing was quantized"
    assert found[0] @ found[1] > 0.7
    assert found[0] @ found[2] < 0.2
    model[0].model = zq.load(encoders[format])  # zq's simulation: rounded weights and activations
    torch.testing.assert_close(found, embed(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_the_same_through_transformers(format: str, encoders: dict[str, Path]) -> None:
    """Mean pooling of AutoModel's last states is what sentence-transformers gives for this model."""
    folder = encoders[format]
    tokens = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    pooled = torch.nn.functional.normalize(mean_pool(hidden, tokens["attention_mask"]), dim=-1)
    torch.testing.assert_close(embed(by_the_card(folder)), pooled, rtol=0, atol=1e-5)


def test_on_zqs_own_products(encoders: dict[str, Path]) -> None:
    """Blocks fused, INT8 products: what docs/serving.md shows."""
    model = by_the_card(encoders["zq"])
    simulated = embed(model)
    assert isinstance(model[0].auto_model.encoder.layer[0].attention.self.query, QuantLinear)
    model[0].model = zq.optimize(zq.load(encoders["zq"]))
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert (embed(model) * simulated).sum(-1).min() > 0.999
