"""A rotated model computes what the model computed; every tensor is what the formulas of the papers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PretrainedConfig, PreTrainedModel

from tests.tiny import TINY, random_model, token_ids
from zq.errors import ZqError
from zq.numerics.rotation import Rotation, hadamard_rotation
from zq.plan import Plan, make_plan
from zq.recipe import Recipe

ALLOWED = ("llama", "llama-tied", "mistral", "qwen2", "qwen3")
REFUSED = ("gpt2", "opt", "opt-post", "gptj", "gpt_neox", "bloom", "bert", "roberta")


def save(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    model = random_model(config)
    model.save_pretrained(folder)
    return model


def plan_of(folder: Path, options: str = "") -> Plan:
    return make_plan(
        folder,
        Recipe.parse(
            "rules: [{match: '*', weights: 'int8:channel'}]\ncalibration: {source: none}\n"
            f"steps: [{{rotate: {{{options}}}}}, {{rtn: {{}}}}]\n"
        ),
    )


def tensors_of(plan: Plan) -> dict[str, torch.Tensor]:
    """Parameter name -> what the rest of a run sees; one call for each, as in a run."""
    return {name: plan.view.read([key])[key] for name, key in plan.skeleton.param_keys.items()}


@torch.no_grad()
def logits(config: Any, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    model = random_model(config, seed=9)
    model.load_state_dict(tensors)
    return model(token_ids()).logits


def dense(rotation: Rotation | None) -> torch.Tensor:
    assert rotation
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ALLOWED)
@pytest.mark.parametrize("options", ["", "r2: false", "r1: false", "kind: random, seed: 3"])
def test_the_function_stays(name: str, tied: bool, options: str, tmp_path: Path) -> None:
    config = TINY[name]()
    config.tie_word_embeddings = tied
    model = save(config, tmp_path)
    plan = plan_of(tmp_path, options)
    tensors = tensors_of(plan)
    if options == "r1: false":
        assert plan.skeleton.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tied else {})
        tensors |= {target: tensors[source] for target, source in plan.skeleton.tied.items()}
    else:
        assert plan.skeleton.tied == {}
        assert plan.skeleton.config.tie_word_embeddings is False
    with torch.no_grad():
        before = model(token_ids()).logits
    after = logits(plan.skeleton.config, tensors)
    assert (after - before).abs().max() < 1e-4
    changed = {name for name, t in tensors.items() if not torch.equal(t, model.state_dict()[name])}
    assert changed == {name for name in plan.view.becomes if name not in plan.skeleton.tied}
    for block in ("model.layers.0", "model.layers.1"):
        assert (f"{block}.self_attn.q_proj.weight" in changed) is (options != "r1: false")
        assert (f"{block}.mlp.down_proj.weight" in changed) is (options != "r1: false")
        assert f"{block}.self_attn.v_proj.weight" in changed
        assert f"{block}.self_attn.o_proj.weight" in changed
    assert not [name for name in changed if "q_norm" in name or "k_norm" in name]


def test_one_tensor_that_is_forgotten_changes_the_function(tmp_path: Path) -> None:
    """Each tensor that changes has to: put back as it was, the logits are others."""
    config = TINY["llama-tied"]()
    model = save(config, tmp_path)
    plan = plan_of(tmp_path)
    tensors = tensors_of(plan)
    before = logits(plan.skeleton.config, tensors)
    for name in plan.view.becomes:
        if ".1." not in name:
            forgotten = tensors | {name: model.state_dict()[name]}
            assert (logits(plan.skeleton.config, forgotten) - before).abs().max() > 1e-2, name


def test_every_tensor_is_what_the_formulas_say(tmp_path: Path) -> None:
    """Against dense matrices, head by head."""
    config = TINY["llama-tied"]()
    config.tie_word_embeddings = False
    old = {name: t.double() for name, t in save(config, tmp_path).state_dict().items()}
    plan = plan_of(tmp_path)
    new = {name: t.double() for name, t in tensors_of(plan).items()}
    p = "model.layers.1."
    r1 = dense(hadamard_rotation(64, "0:0:R1"))
    r2 = dense(hadamard_rotation(16, "0:0:R2:1"))
    attention, mlp = old[f"{p}input_layernorm.weight"], old[f"{p}post_attention_layernorm.weight"]
    values = torch.block_diag(r2, r2)  # 2 key-value heads
    heads = torch.block_diag(r2, r2, r2, r2)  # 4 query heads
    expected = {
        "model.embed_tokens.weight": old["model.embed_tokens.weight"] @ r1,
        "lm_head.weight": old["lm_head.weight"] * old["model.norm.weight"] @ r1,
        "model.norm.weight": torch.ones(64),
        f"{p}input_layernorm.weight": torch.ones(64),
        f"{p}self_attn.q_proj.weight": old[f"{p}self_attn.q_proj.weight"] * attention @ r1,
        f"{p}self_attn.k_proj.weight": old[f"{p}self_attn.k_proj.weight"] * attention @ r1,
        f"{p}self_attn.v_proj.weight": values.T @ (old[f"{p}self_attn.v_proj.weight"] * attention) @ r1,
        f"{p}self_attn.v_proj.bias": old[f"{p}self_attn.v_proj.bias"] @ values,
        f"{p}self_attn.o_proj.weight": r1.T @ old[f"{p}self_attn.o_proj.weight"] @ heads,
        f"{p}self_attn.o_proj.bias": old[f"{p}self_attn.o_proj.bias"] @ r1,
        f"{p}self_attn.q_proj.bias": old[f"{p}self_attn.q_proj.bias"],
        f"{p}mlp.gate_proj.weight": old[f"{p}mlp.gate_proj.weight"] * mlp @ r1,
        f"{p}mlp.up_proj.weight": old[f"{p}mlp.up_proj.weight"] * mlp @ r1,
        f"{p}mlp.up_proj.bias": old[f"{p}mlp.up_proj.bias"],
        f"{p}mlp.down_proj.weight": r1.T @ old[f"{p}mlp.down_proj.weight"],
        f"{p}mlp.down_proj.bias": old[f"{p}mlp.down_proj.bias"] @ r1,
    }
    for name, tensor in expected.items():
        assert torch.allclose(new[name], tensor.double(), atol=1e-5), name


def test_outliers_are_spread(tmp_path: Path) -> None:
    config = TINY["llama"]()
    model = random_model(config)
    p = "model.layers.0."
    with torch.no_grad():
        model.get_parameter(f"{p}self_attn.q_proj.weight")[:, 5] *= 20
        model.get_parameter(f"{p}mlp.down_proj.weight")[9] *= 20
        model.get_parameter(f"{p}self_attn.v_proj.weight")[3] *= 20
        model.get_parameter("model.embed_tokens.weight")[:, 8] *= 20
    model.save_pretrained(tmp_path)
    new, old = tensors_of(plan_of(tmp_path)), model.state_dict()
    names = ("self_attn.q_proj.weight", "mlp.down_proj.weight", "self_attn.v_proj.weight")
    for name in (*(p + name for name in names), "model.embed_tokens.weight"):
        assert peak(new[name]) < peak(old[name]) / 2, name
        assert kurtosis(new[name]) < kurtosis(old[name]) / 4, name


def peak(x: torch.Tensor) -> float:
    return float(x.abs().max() / x.square().mean().sqrt())


def kurtosis(x: torch.Tensor) -> float:
    return float((x - x.mean()).pow(4).mean() / x.var().square())


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_stream_cannot_be_rotated(name: str, tmp_path: Path) -> None:
    save(TINY[name](), tmp_path)
    with pytest.raises(ZqError, match="allowed are llama, mistral, qwen2, qwen3; drop the step"):
        plan_of(tmp_path)


def test_a_model_without_a_head_takes_only_r2(tmp_path: Path) -> None:
    random_model(TINY["llama"]()).base_model.save_pretrained(tmp_path)
    with pytest.raises(ZqError, match="LlamaModel has no language-model head"):
        plan_of(tmp_path)
    becomes = plan_of(tmp_path, "r1: false").view.becomes
    assert {name.split(".")[-2] for name in becomes} == {"v_proj", "o_proj"}


def odd_config() -> PretrainedConfig:
    config = TINY["llama"]().to_dict() | {"hidden_size": 188, "num_attention_heads": 2, "head_dim": 94}
    return type(TINY["llama"]())(**config | {"num_key_value_heads": 1})


def test_a_size_that_no_hadamard_matrix_has(tmp_path: Path) -> None:
    model = save(odd_config(), tmp_path)
    with pytest.raises(ZqError, match=r"size 188 \(hidden_size\); .*set kind: random or r1: false"):
        plan_of(tmp_path)
    with pytest.raises(ZqError, match=r"size 94 \(head_dim\); .*set kind: random or r2: false"):
        plan_of(tmp_path, "r1: false")
    plan = plan_of(tmp_path, "kind: random")
    with torch.no_grad():
        before = model(token_ids()).logits
    assert (logits(plan.skeleton.config, tensors_of(plan)) - before).abs().max() < 1e-4


def test_both_off_is_a_mistake(tmp_path: Path) -> None:
    save(TINY["llama"](), tmp_path)
    with pytest.raises(ZqError, match="does nothing; drop the step"):
        plan_of(tmp_path, "r1: false, r2: false")


def test_the_seeds_of_step_and_recipe_decide(tmp_path: Path) -> None:
    save(TINY["llama"](), tmp_path)
    key = "model.embed_tokens.weight"
    plans = {options: plan_of(tmp_path, options) for options in ("", "seed: 0", "seed: 1")}
    read = {options: plan.view.read([key])[key] for options, plan in plans.items()}
    assert torch.equal(read[""], read["seed: 0"])
    assert not torch.equal(read[""], read["seed: 1"])
    text = "rules: [{match: '*', weights: 'int8:channel'}]\nseed: 1\nsteps: [rotate, rtn]\n"
    seeded = make_plan(tmp_path, Recipe.parse(text + "calibration: {source: none}\n"))
    assert not torch.equal(read[""], seeded.view.read([key])[key])
