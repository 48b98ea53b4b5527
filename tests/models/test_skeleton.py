"""The skeleton against the model that transformers loads from the same files."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from tests.models.conftest import shapes_of
from tests.tiny import TINY
from zq.errors import ZqError
from zq.models.build import empty_model
from zq.models.families import FAMILIES
from zq.models.find import find_arch, load_config, model_class
from zq.models.skeleton import Skeleton, build_skeleton

BLOCK_CLASS_ENDINGS = ("DecoderLayer", "Block", "GPTNeoXLayer", "BertLayer", "RobertaLayer")


def _load_all(skeleton: Skeleton, read) -> None:
    skeleton.load_outside(read)
    for i in range(skeleton.n_blocks):
        skeleton.load_block(i, read)
    skeleton.load_tail(read)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_loaded_skeleton_equals_the_reference(name, dtype, saved):
    """Every parameter and every buffer, bit for bit, with the same dtype."""
    stored = saved(name, dtype)
    skeleton = stored.skeleton(dtype)
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())
    assert skeleton.missing == ()
    assert skeleton.extra == []
    _load_all(skeleton, stored.read)
    for kind in ("named_parameters", "named_buffers"):
        ours = dict(getattr(skeleton.model, kind)(remove_duplicate=False))
        theirs = dict(getattr(stored.reference, kind)(remove_duplicate=False))
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            assert ours[key].dtype == tensor.dtype, key
            assert torch.equal(ours[key], tensor), key
    assert not skeleton.model.training


@pytest.mark.parametrize("name", TINY)
def test_all_linears_are_found(name, saved):
    """Compare with a walk of the reference model that knows blocks only by their class name."""
    stored = saved(name)
    skeleton = stored.skeleton()
    modules = dict(stored.reference.named_modules())
    blocks = [n for n, m in modules.items() if type(m).__name__.endswith(BLOCK_CLASS_ENDINGS)]
    linears = {n for n, m in modules.items() if isinstance(m, (nn.Linear, Conv1D))}
    inside = {n for n in linears if any(n.startswith(f"{block}.") for block in blocks)}

    assert [skeleton.block_prefix(i) for i in range(skeleton.n_blocks)] == blocks
    infos = [info for i in range(skeleton.n_blocks) for info in skeleton.linears(i)]
    assert sorted(info.name for info in infos) == sorted(inside)
    assert sorted(skeleton.other_linears()) == sorted(linears - inside)
    for info in infos:
        module = modules[info.name]
        probe = torch.zeros(1, info.k)
        assert module(probe).shape == (1, info.n)  # n and k the right way round, transposed or not
        assert info.transposed is isinstance(module, Conv1D)
        assert info.bias is (module.bias is not None)
        assert skeleton.key_of(f"{info.name}.weight") in stored.tensors
    by_kind = {info.name.split(".")[-1]: info.kind for info in infos}
    assert set(by_kind.values()) == {"attention", "mlp"}


@pytest.mark.parametrize("name", TINY)
def test_ties_and_keys_account_for_everything(name, saved):
    stored = saved(name)
    skeleton = stored.skeleton()
    every = [n for n, _ in stored.reference.named_parameters(remove_duplicate=False)]
    reference_ties = stored.reference.all_tied_weights_keys
    assert skeleton.tied == reference_ties
    assert sorted(skeleton.param_keys.values()) == sorted(stored.tensors)
    assert skeleton.param_keys.keys() | skeleton.tied.keys() == set(every)
    zones = [*range(skeleton.n_blocks), "outside", "tail"]
    assert sorted(n for zone in zones for n in skeleton.zone(zone)) == sorted(every)
    for target, source in skeleton.tied.items():
        assert skeleton.key_of(target) == skeleton.key_of(source)
    assert skeleton.check(stored.shapes) == []


def test_tied_head_shares_the_loaded_embedding(saved):
    stored = saved("llama-tied")
    skeleton = stored.skeleton()
    skeleton.load_outside(stored.read)
    skeleton.load_tail(stored.read)
    assert skeleton.model.lm_head.weight is skeleton.model.model.embed_tokens.weight
    skeleton.unload_outside()
    assert skeleton.model.lm_head.weight.device.type == "cpu"
    skeleton.unload_tail()
    skeleton.load_tail(stored.read)  # without the embedding in memory
    assert torch.equal(skeleton.model.lm_head.weight, stored.tensors["model.embed_tokens.weight"])
    assert skeleton.model.model.embed_tokens.weight.device.type == "meta"


def test_unloading_frees_a_block_and_reads_only_its_keys(saved):
    stored = saved("llama")
    skeleton = stored.skeleton()
    asked: list[str] = []

    def read(keys):
        keys = list(keys)
        asked.extend(keys)
        return stored.read(keys)

    skeleton.load_block(1, read)
    assert asked
    assert all(key.startswith("model.layers.1.") for key in asked)
    held = [weakref.ref(p) for p in skeleton.block(1).parameters()]
    skeleton.unload_block(1)
    gc.collect()
    assert all(ref() is None for ref in held)
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())


# --- checkpoints that differ from the model's own names ---------------------------------------


def _variant(saved, name: str, change) -> tuple[Skeleton, dict[str, torch.Tensor]]:
    stored = saved(name)
    tensors = change(dict(stored.tensors))
    config = load_config(stored.folder)
    skeleton = build_skeleton(config, find_arch(config, "x"), shapes_of(tensors), torch.float32)
    _load_all(skeleton, lambda keys: {key: tensors[key] for key in keys})
    for path, parameter in stored.reference.named_parameters(remove_duplicate=False):
        assert torch.equal(skeleton.model.get_parameter(path), parameter), path
    return skeleton, tensors


@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt", "bert", "gpt_neox", "qwen3"])
def test_keys_without_the_base_prefix(name, saved):
    prefix = f"{saved(name).reference.base_model_prefix}."
    skeleton, _ = _variant(
        saved, name, lambda tensors: {k.removeprefix(prefix): v for k, v in tensors.items()}
    )
    assert skeleton.extra == []


def test_plain_encoder_from_keys_with_a_prefix_and_foreign_heads(saved):
    def change(tensors):
        head = {"cls.predictions.bias": torch.zeros(4)}
        return {f"bert.{k}": v for k, v in tensors.items()} | head

    skeleton, _ = _variant(saved, "bert-model", change)
    assert skeleton.extra == ["cls.predictions.bias"]


def test_old_layer_norm_names(saved):
    def change(tensors):
        for new, old in (("weight", "gamma"), ("bias", "beta")):
            tensors = {k.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): v for k, v in tensors.items()}
        return tensors

    skeleton, tensors = _variant(saved, "bert", change)
    assert any(key.endswith("gamma") for key in tensors)
    assert skeleton.extra == []


def test_pythia_head_name(saved):
    _variant(
        saved,
        "gpt_neox",
        lambda t: {k.replace("lm_head.", "embed_out."): v for k, v in t.items()},
    )


def test_old_buffers_are_extra(saved):
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    skeleton, _ = _variant(saved, "gpt2", lambda tensors: tensors | mask)
    assert skeleton.extra == list(mask)


def test_only_the_tied_copy_is_stored(saved):
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    skeleton, _ = _variant(saved, "llama-tied", change)
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert skeleton.key_of("model.embed_tokens.weight") == "lm_head.weight"


def test_both_stored_are_two_parameters(saved):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        return tensors

    skeleton, _ = _variant(saved, "llama-tied", change)
    assert skeleton.tied == {}
    assert skeleton.key_of("lm_head.weight") == "lm_head.weight"


def test_both_stored_and_equal_stay_tied(saved):
    stored = saved("llama-tied")
    config, shapes, asked = load_config(stored.folder), dict(stored.shapes), []
    shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    skeleton = build_skeleton(
        config, FAMILIES["llama"], shapes, torch.float32, same=lambda *keys: asked.append(keys) or True
    )
    assert asked == [("lm_head.weight", "model.embed_tokens.weight")]
    assert skeleton.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert skeleton.key_of("lm_head.weight") == "model.embed_tokens.weight"
    assert skeleton.extra == ["lm_head.weight"]


def test_encoder_stored_without_pooler(saved):
    stored = saved("bert-model")
    tensors = {k: v for k, v in stored.tensors.items() if "pooler" not in k}
    config = load_config(stored.folder)
    skeleton = build_skeleton(config, FAMILIES["bert"], shapes_of(tensors), torch.float32)
    assert skeleton.other_linears() == []
    assert skeleton.omitted == ["pooler.dense"]
    assert stored.skeleton().omitted == []


# --- refusals ---------------------------------------------------------------------------------


def _refusal(saved, name: str, *, arch=None, shapes=None, **changes) -> str:
    stored = saved(name)
    config = load_config(stored.folder)
    for key, value in changes.items():
        setattr(config, key, value)
    arch = arch or find_arch(config, "x")
    with pytest.raises(ZqError) as caught:
        build_skeleton(config, arch, shapes or stored.shapes, torch.float32, where="tiny/model")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("tiny/model: ")
    return message


def test_shape_that_disagrees_with_the_config(saved):
    message = _refusal(saved, "llama", intermediate_size=96)
    assert "6 tensors do not fit LlamaForCausalLM" in message
    assert (
        "model.layers.0.mlp.gate_proj.weight: the checkpoint has shape [128, 64], "
        "config.json asks for [96, 64]" in message
    )
    assert "and 1 more" in message


def test_missing_tensors(saved):
    shapes = {k: v for k, v in saved("gpt2").shapes.items() if "ln_2.bias" not in k}
    message = _refusal(saved, "gpt2", shapes=shapes)
    assert "2 tensors do not fit" in message
    assert "transformer.h.1.ln_2.bias: missing from the checkpoint" in message


def test_missing_embedding_is_no_tie(saved):
    shapes = dict(saved("llama-tied").shapes)
    del shapes["model.embed_tokens.weight"]
    message = _refusal(saved, "llama-tied", shapes=shapes)
    assert "1 tensors do not fit" in message
    assert "model.embed_tokens.weight: missing" in message


def test_lenient_build_reports_through_check(saved):
    stored = saved("opt")
    shapes = dict(stored.shapes)
    shapes["model.decoder.layers.0.fc1.bias"] = (3,)
    gone = "model.decoder.layers.1.fc2.weight"
    del shapes[gone]
    config = load_config(stored.folder)
    skeleton = build_skeleton(config, FAMILIES["opt"], shapes, torch.float32, strict=False)
    assert skeleton.missing == (gone,)
    problems = skeleton.check(shapes)
    assert len(problems) == 2
    assert any(gone in p and "missing" in p for p in problems)
    assert any("fc1.bias" in p and "[3]" in p and "[128]" in p for p in problems)


def test_tensor_that_changed_since_the_header_was_read(saved):
    stored = saved("llama")
    skeleton = stored.skeleton()
    with pytest.raises(ZqError, match=r"holds shape \[2, 2\], config.json asks for"):
        skeleton.load_block(0, lambda keys: {key: torch.zeros(2, 2) for key in keys})


def test_config_that_contradicts_itself(saved):
    assert "cannot build GPT2LMHeadModel" in _refusal(saved, "gpt2", num_attention_heads=5)


@pytest.mark.parametrize(
    "sites",
    [
        pytest.param(lambda sites: sites[:-1], id="a linear in no site"),
        pytest.param(lambda sites: (*sites, sites[0]), id="a linear in two sites"),
        pytest.param(lambda sites: (*sites, replace(sites[0], linears=("mlp.router",))), id="no such linear"),
    ],
)
def test_incomplete_description(sites, saved):
    arch = FAMILIES["llama"]
    message = _refusal(saved, "llama", arch=replace(arch, sites=sites(arch.sites)))
    assert "family description incomplete" in message


def test_cross_attention_is_not_skipped(saved):
    message = _refusal(saved, "gpt2", add_cross_attention=True)
    assert "family description incomplete" in message
    assert "crossattention.c_attn" in message


def test_config_is_left_alone(saved):
    config = load_config(saved("gptj").folder)
    before = config.to_dict()
    empty_model(model_class(config), config, dtype=torch.bfloat16, device="cpu")
    assert config.to_dict() == before
