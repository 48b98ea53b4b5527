"""On a CUDA device: optimized models, their graphs and their memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, StaticCache

import zq
from tests.runtime.gpu_smoke import launches
from tests.runtime.quantized import SCHEMES, W4A8, W8A8, SchemeOf, distance, in_float32, quantized
from tests.runtime.test_ahead import Told
from tests.simulate import outputs, recipe
from tests.tiny import TINY, random_model, save_tiny, token_ids
from zq.errors import ZqError
from zq.pipeline import quantize
from zq.plan import make_plan
from zq.runtime import ahead
from zq.runtime.blocks.around import Around
from zq.runtime.cache import cache_argument, make_cache
from zq.runtime.captured import Captured
from zq.runtime.graphs import PATIENCE
from zq.runtime.linear import QuantLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DECODERS = [name for name in TINY if "bert" not in name]
ENCODERS = [name for name in TINY if "bert" in name]
SLIDING = ("mistral", "qwen2")


@pytest.fixture(autouse=True)
def no_capture_fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A capture that fails falls back, with a warning: here that is a failure."""
    original = Captured._capture

    def checked(self: Captured, *args: Any) -> bool:
        assert original(self, *args), "not captured"
        return True

    monkeypatch.setattr(Captured, "_capture", checked)
    yield
    gc.collect()


def on_gpu(name: str, scheme: SchemeOf, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """(the model before `optimize`, an optimized copy)"""
    model = quantized(name, scheme, dtype).cuda()
    return model, zq.optimize(quantized(name, scheme, dtype).cuda())


def replays(model: Any) -> int:
    return sum(seen.calls - seen.eager for seen in model.zq_runner.seen.values() if seen.graph is not None)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", TINY)
def test_operators(name: str, scheme: str) -> None:
    model, fused = on_gpu(name, SCHEMES[scheme])
    ids = token_ids().cuda()
    exact, simulated, found = outputs(in_float32(model), ids), outputs(model, ids), outputs(fused, ids)
    assert distance(found, simulated) < 4e-2
    assert distance(found, exact) < 1.15 * distance(simulated, exact)
    assert all("kernel" in way for way in fused.zq_fused.linears)
    assert fused.zq_fused.graphs


def padded(batch: int, length: int) -> dict[str, torch.Tensor]:
    ids = token_ids(batch, length).cuda()
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any, on: bool, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, logits) of greedy steps; `on` False: as transformers runs them."""
    model.zq_runner.on = on
    out = model.generate(
        **given, output_logits=True, return_dict_in_generate=True, pad_token_id=0, eos_token_id=None
    )
    return out.sequences, torch.stack(out.logits)


@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str) -> None:
    """Several calls in a row with other batches and lengths: captured, and what eager steps give."""
    _, model = on_gpu(name, W4A8)
    for given in (padded(3, 9), padded(1, 5), padded(3, 14), padded(2, 7)):
        eager, captured = (logits(model, on, **given, max_new_tokens=6) for on in (False, True))
        assert captured[0].shape == eager[0].shape
        same = int((eager[0] == captured[0]).all(0).long().cumprod(0).sum()) - given["input_ids"].shape[1]
        assert same >= 1
        assert distance(captured[1][: same + 1], eager[1][: same + 1]) < 3e-2
    if name not in SLIDING:
        assert len(model.zq_runner.seen) == 3, "three batch sizes at one length"
        assert replays(model) == 4 * 5 - 3


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gptj", "opt", "gpt_neox"])
def test_prompts_are_captured_when_they_come_again(name: str) -> None:
    """Other tokens and other padding of the same shape, replayed: what transformers computes."""
    _, model = on_gpu(name, W4A8)
    for seed in range(5):
        ids = token_ids(2, 12, seed=seed).cuda()
        mask = torch.ones_like(ids)
        mask[1, : seed + 1] = 0
        given = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 1}
        eager, captured = (logits(model, on, **given) for on in (False, True))
        assert distance(captured[1], eager[1]) < 3e-2
    (seen,) = model.zq_runner.prompts.values()
    assert seen.graph is not None
    assert seen.calls == 5


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gptj", "opt", "gpt_neox"])
def test_texts_are_captured_when_they_come_again(name: str) -> None:
    """Replayed with other tokens: logits, and keys and values, are those of the model without graphs, and
    what was returned before stays as it was."""
    _, model = on_gpu(name, W4A8)
    argument, before = cache_argument(model), []
    for seed in range(5):
        ids, found = token_ids(2, 12, seed=seed).cuda(), []
        for on in (False, True):
            model.zq_runner.on = on
            with torch.no_grad():
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids))
            found.append([out.logits, *(x for y in out[argument].layers for x in (y.keys, y.values))])
        assert all(distance(a, b) < 3e-2 for a, b in zip(*found, strict=True))
        before.append((found[1], [x.clone() for x in found[1]]))
    assert all(torch.equal(a, b) for kept, copies in before for a, b in zip(kept, copies, strict=True))
    (seen,) = model.zq_runner.texts.values()
    assert seen.graph is not None
    assert seen.calls == 5


@torch.no_grad()
def test_a_larger_text_moves_what_was_captured() -> None:
    """Each length is captured, the first one again after the larger one has taken its memory."""
    _, model = on_gpu("llama", W4A8)
    for length in (12, 40, 12, 40):
        for seed in range(4):
            ids, found = token_ids(2, length, seed=seed).cuda(), []
            for model.zq_runner.on in (False, True):
                found.append(model(input_ids=ids).logits)
            assert distance(found[1], found[0]) < 3e-2
    assert [seen.graph is not None for seen in model.zq_runner.texts.values()] == [True, True]


@pytest.mark.parametrize("kv", [None, "int8", "fp8"])
@pytest.mark.parametrize("name", DECODERS)
def test_steps_on_zqs_attention(name: str, kv: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against torch's attention; over a quantized cache, against its own update."""
    _, model = on_gpu(name, W4A8)
    given, found = padded(3, 9), []
    for own in (True, False):
        cache = make_cache(model.config, 3, 24, torch.bfloat16, kv, "cuda")
        if not own and kv is None:
            monkeypatch.setattr(Around, "fits", lambda *_: False)
        on = own or kv is None
        found.append(logits(model, on, **given, past_key_values=cache, max_new_tokens=6))
    owns = {seen.buffers.own for seen in model.zq_runner.seen.values()}
    if name in SLIDING:  # a window of 6 positions
        assert owns == ({False} if kv is None else set())
    else:
        assert owns == ({True, False} if kv is None else {True})
    same = int((found[0][0] == found[1][0]).all(0).long().cumprod(0).sum()) - 9
    assert same >= 1
    assert distance(found[0][1][: same + 1], found[1][1][: same + 1]) < 4e-2


def test_kernels_of_a_step() -> None:
    """Ten in a layer of a Llama in W4A8, and few around them."""
    counts = []
    for layers in (2, 5):
        config = TINY["llama"]()
        config.num_hidden_layers = layers
        model = quantized("llama", W4A8, model=random_model(config, torch.bfloat16)).cuda()
        zq.optimize(model)
        model.generate(**padded(1, 9), max_new_tokens=4, eos_token_id=None, pad_token_id=0)
        (seen,) = model.zq_runner.seen.values()
        assert seen.buffers.own
        counts.append(launches(seen.graph.replay))
    assert counts[1] - counts[0] == 3 * 8
    assert counts[0] - 2 * 8 <= 9, "seven, and room for a product that torch cuts in parts"


def test_the_graph_is_the_step() -> None:
    """Replayed or not, the same tokens to the last one, sampled ones too."""
    _, model = on_gpu("llama", W4A8)
    given = {**padded(4, 11), "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
    for sample in (False, True):
        found = []
        for capture in (False, True):
            model.zq_runner.capture = capture
            torch.manual_seed(3)
            found.append(model.generate(**given, do_sample=sample))
        assert torch.equal(*found)
    assert replays(model) > 40


def both_loops(model: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> list[torch.Tensor]:
    """Tokens of a seeded call, a step ahead of the device and with transformers' loop."""
    found, states = [], []
    for fits in (ahead.fits, lambda *_: False):
        with monkeypatch.context() as patch:
            patch.setattr(ahead, "fits", fits)
            torch.manual_seed(7)
            found.append(model.generate(**given, pad_token_id=0))
            states.append(torch.cuda.get_rng_state())
    assert torch.equal(*states)
    return found


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gptj", "bloom", "opt", "gpt_neox"])
def test_a_step_ahead_of_the_device(name: str, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of transformers' loop, rows that end at different steps and early included."""
    _, model = on_gpu(name, W4A8)
    given = {**padded(3, 9), "max_new_tokens": 16, "do_sample": sampled}
    for _ in range(2):  # afterwards all steps are replayed
        free, wanted = both_loops(model, monkeypatch, **given, eos_token_id=None)
    assert torch.equal(free, wanted)
    for steps in ((1, 6, 11), (0, 0, 0), (2, 3, 3), (14, 14, 14), (15, 15, 15)):
        eos = [int(row[9 + step]) for row, step in zip(free, steps, strict=True)]
        assert torch.equal(*both_loops(model, monkeypatch, **given, eos_token_id=eos))


def test_a_call_on_another_stream_waits_for_the_step_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = on_gpu("llama", W4A8)
    given = {**padded(3, 9), "max_new_tokens": 16}
    wanted = both_loops(model, monkeypatch, **given, eos_token_id=None)[1]
    for _ in range(8):
        model.generate(**given, pad_token_id=0, eos_token_id=wanted[:, 9].tolist())
        with torch.cuda.stream(torch.cuda.Stream()):
            found = model.generate(**given, pad_token_id=0, eos_token_id=None)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_device_is_never_waited_for_at_once(sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second step on there is only the event of the flags, which is behind by a launch."""
    _, model = on_gpu("llama", W4A8)
    given = {**padded(2, 9), "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": [10**6]}
    model.generate(**given, do_sample=sampled)
    sent: list[int] = []
    original = ahead.Mail.send

    def send(self: ahead.Mail, *values: torch.Tensor) -> None:
        sent.append(len(values))
        original(self, *values)
        if len(sent) == 2:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(ahead.Mail, "send", send)
    try:
        model.generate(**given, do_sample=sampled)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sent == [1] * 12


def test_a_streamer_gets_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = on_gpu("llama", W4A8)
    given = {**padded(1, 9), "max_new_tokens": 12, "pad_token_id": 0}
    free = model.generate(**given, eos_token_id=None)
    for eos in (None, int(free[0, 9 + 5])):
        told = Told()
        found = model.generate(**given, eos_token_id=eos, streamer=told)
        assert torch.equal(torch.cat([x.view(-1) for x in told.texts[:-1]]), found[0].cpu())
        assert told.texts[-1] is None


def test_a_static_cache_of_the_users_own() -> None:
    _, model = on_gpu("qwen3", W8A8)
    ids = token_ids(2, 8).cuda()
    found = []
    for _ in range(2):
        cache = StaticCache(model.config, max_cache_len=64)
        out = model.generate(
            input_ids=ids, past_key_values=cache, max_new_tokens=5, eos_token_id=None, pad_token_id=0
        )
        assert int(cache.get_seq_length()) == 12
        found.append(out)
    assert torch.equal(*found)
    assert model.zq_runner.seen


@pytest.mark.parametrize("given", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_what_is_unusual_runs_as_ever(given: dict[str, Any]) -> None:
    _, model = on_gpu("llama", W4A8)
    ids = token_ids(1, 8).cuda()
    found = []
    for on in (False, True):
        model.zq_runner.on = on
        found.append(model.generate(input_ids=ids, max_new_tokens=6, pad_token_id=0, **given))
    assert torch.equal(*found)
    assert not model.zq_runner.seen


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str) -> None:
    _, model = on_gpu(name, W8A8)
    with torch.no_grad():
        for batch, length in ((3, 9), (1, 16), *[(3, 9)] * (PATIENCE + 1)):
            given = padded(batch, length)
            model.zq_runner.on = False
            wanted = model(**given)[0]
            model.zq_runner.on = True
            found = model(**given)[0]
            seen = given["attention_mask"].bool()
            assert distance(found[seen], wanted[seen]) < 2e-2
    assert replays(model) == 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runtime")
    save_tiny("llama", root / "source", torch.bfloat16)
    quantize(
        make_plan(root / "source", recipe("*self_attn* = int8:channel @ int8:token; * = e2m1fn:b64")),
        root / "zq",
    )
    quantize(make_plan(root / "source", recipe(f"* = {W4A8}")), root / "ct")
    return root


@pytest.mark.parametrize("name", ["zq", "ct"])
def test_load_packs_and_the_simulation_is_still_there(name: str, checkpoint: Path, tmp_path: Path) -> None:
    folder, ids = checkpoint / name, token_ids()
    packed, simulated = zq.load(folder, device="cuda"), zq.load(folder, device="cuda", kernels=False)
    assert not any(isinstance(module, QuantLinear) for module in packed.modules())
    assert sum(isinstance(module, QuantLinear) for module in simulated.modules()) == 14
    wanted = outputs(simulated, ids.cuda())
    assert distance(outputs(packed, ids.cuda()), wanted) < 4e-2
    assert distance(outputs(zq.optimize(packed), ids.cuda()), wanted) < 4e-2
    simulated.save_pretrained(tmp_path / "again")
    with pytest.raises(ZqError, match="packed for kernels"):
        packed.save_pretrained(tmp_path / "packed")


def test_the_transformers_plug_in_packs_on_a_gpu(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint / "zq", device_map="cuda").eval()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    wanted = outputs(zq.load(checkpoint / "zq", device="cuda", kernels=False), token_ids().cuda())
    assert distance(outputs(model, token_ids().cuda()), wanted) < 4e-2
    assert distance(outputs(zq.optimize(model), token_ids().cuda()), wanted) < 4e-2


def test_memory_goes_back() -> None:
    """Packed and optimized, a model is as large as its codes, and no copy of them stays."""
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = zq.optimize(quantized("llama", W4A8).cuda())
    gc.collect()
    held = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before < 1.3 * held + (1 << 20)
