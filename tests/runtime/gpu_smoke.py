# ruff: noqa: T201 (a script)
"""Optimized models on a GPU, without pytest, for a machine that is there for minutes only.

    python -m tests.runtime.gpu_smoke check                 small models: fused and captured, or simulated
    python -m tests.runtime.gpu_smoke decode [--blocks 32] [--batch 1] [--context 512] [--tokens 64]
                                             [--kv int8] [--torch] [--profile]
                                                            a Llama of 8B's shape with random INT4 codes
    python -m tests.runtime.gpu_smoke encode [--batch 8] [--length 128] [--profile]
                                                            BERT-base's shape, INT8

`check` compares logits with those of the unoptimized simulation, tokens of replayed graphs with those of the
same steps run eagerly, and logits of steps on zq's attention with those on torch's; over caches of 8 bits
with what their own update gives. `decode` and `encode` print milliseconds (median), launches of a step and
memory. A step is measured over a cache that holds --context random tokens, generate with a prompt of that
length (2048 at most). --torch: on torch's attention. --profile: the kernels of a step by name.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import zq
from tests.simulate import block_linears
from zq.bench.shapes import shape_config
from zq.bench.synthetic import empty, random_model, schemes
from zq.models.layout import linear_shape
from zq.numerics.qtensor import quantize
from zq.runtime.blocks.around import Around
from zq.runtime.cache import make_cache
from zq.runtime.graphs import PATIENCE
from zq.runtime.linear import replace_linear
from zq.spec import Scheme

BF16, CUDA = torch.bfloat16, torch.device("cuda")
W4A8, W8A8 = "int4:g128 @ int8:token", "int8:channel @ int8:token"
SMALL: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=4096, architectures=["LlamaForCausalLM"],
    ),
    "qwen3": lambda: transformers.Qwen3Config(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, vocab_size=4096, architectures=["Qwen3ForCausalLM"],
    ),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=1024, n_layer=4, n_head=16, vocab_size=4096, architectures=["GPT2LMHeadModel"]
    ),
    "gptj": lambda: transformers.GPTJConfig(
        n_embd=1024, n_layer=4, n_head=16, rotary_dim=32, vocab_size=4096, architectures=["GPTJForCausalLM"]
    ),
    "bloom": lambda: transformers.BloomConfig(
        hidden_size=1024, n_layer=4, n_head=16, vocab_size=4096, architectures=["BloomForCausalLM"]
    ),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16,
        vocab_size=4096, architectures=["GPTNeoXForCausalLM"],
    ),
    "bert": lambda: transformers.BertConfig(num_hidden_layers=4, architectures=["BertModel"]),
}  # fmt: skip


def build(config: Any, scheme: str) -> Any:
    """A random model in bf16 on the GPU with quantized blocks."""
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])(config).to(CUDA, BF16).eval()
    parsed = Scheme.parse(scheme)
    for name in block_linears(model):
        old = model.get_submodule(name)
        weight = old.weight.detach()
        weight = weight if tuple(weight.shape) == linear_shape(old) else weight.T.contiguous()
        replace_linear(model, name, parsed, BF16).set_weight(quantize(weight, parsed.weights))
    return model


def fill_llama(blocks: int, positions: int) -> Any:
    """A Llama of 8B's shape, packed layer by layer; no weight is ever there in 16 bits."""
    config = shape_config("llama-3-8b", blocks)
    config.max_position_embeddings = positions
    return random_model(config, BF16, "cuda", schemes(empty(config, BF16, "cpu"), W4A8))


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


@torch.no_grad()
def check() -> None:
    bad = []
    for name, make in SMALL.items():
        for scheme in (W4A8, W8A8, "int4:g128:two-level @ int8:token", "int4:g128"):
            torch.manual_seed(1)
            ids = torch.randint(3, 4000, (3, 40), device=CUDA)
            mask = torch.ones_like(ids)
            mask[1, :7] = mask[2, :19] = 0
            model = build(make(), scheme)
            wanted = model(input_ids=ids, attention_mask=mask)[0]
            zq.optimize(model)
            model.zq_runner.on = False
            apart = distance(
                *(x[mask.bool()] for x in (model(input_ids=ids, attention_mask=mask)[0], wanted))
            )
            model.zq_runner.on = True
            same = encoded(model, ids, mask) if name == "bert" else stepped(model, ids, mask)
            against = {} if name == "bert" else attentions(model, ids, mask)
            good = apart < 5e-2 and same and all(each < 5e-2 for each in against.values())
            bad += [] if good else [f"{name} {scheme}"]
            verdict = "ok " if good else "BAD"
            print(f"{verdict} {name:9} {scheme:34} apart {apart:.1e}  replayed as eager: {same}", end="  ")
            print(*(f"{what} {each:.1e}" for what, each in against.items()))
    print("all good" if not bad else f"BAD: {', '.join(bad)}")


def stepped(model: Any, ids: Tensor, mask: Tensor) -> bool:
    """Whether replayed graphs give the tokens of the same steps run eagerly, and were really replayed."""
    found = []
    for capture in (False, True, True):
        model.zq_runner.capture = capture
        given = {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
        found.append(model.generate(input_ids=ids, attention_mask=mask, **given))
    captured = [seen for seen in model.zq_runner.seen.values() if seen.graph is not None]
    return bool(captured) and all(torch.equal(found[0], each) for each in found[1:])


def attentions(model: Any, ids: Tensor, mask: Tensor) -> dict[str, float]:
    """How far logits of steps on zq's attention are from those on torch's, and those over a cache of 8 bits
    from those over one that `update` writes and dequantizes; as long as tokens are the same."""

    def logits(kv: str | None) -> tuple[Tensor, Tensor]:
        cache = make_cache(model.config, ids.shape[0], ids.shape[1] + 8, BF16, kv, CUDA)
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=8, do_sample=False,
            pad_token_id=0, eos_token_id=None, output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits)

    runner, fits, found = model.zq_runner, Around.fits, {}
    runner.capture = True
    for kv in (None, "int8", "fp8"):
        mine = logits(kv)
        own = [seen for seen in runner.seen.values() if getattr(seen.buffers, "own", False) and seen.graph]
        if kv is None:
            Around.fits = lambda *_: False  # type: ignore[method-assign]
        else:
            runner.on = False
        try:
            theirs = logits(kv)
        finally:
            Around.fits, runner.on = fits, True  # type: ignore[method-assign]
        same = int((mine[0] == theirs[0]).all(0).long().cumprod(0).sum())
        upto = min(same + 1, 8)
        far = distance(mine[1][:upto], theirs[1][:upto]) if own and upto > 1 else float("inf")
        found["zq/torch" if kv is None else kv] = far
    return found


def encoded(model: Any, ids: Tensor, mask: Tensor) -> bool:
    found = [model(input_ids=ids, attention_mask=mask)[0] for _ in range(PATIENCE + 3)]
    captured = [seen for seen in model.zq_runner.seen.values() if seen.graph is not None]
    return bool(captured) and all(torch.equal(found[0], each) for each in found[1:])


def launches(call: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    return sum(str(event.device_type).endswith("CUDA") for event in traced.events())


def table(call: Callable[[], Any], rows: int = 12) -> None:
    """The kernels of a call by name: how many, microseconds altogether."""
    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in traced.events():
        if str(event.device_type).endswith("CUDA"):
            found.setdefault(event.name, []).append(event.time_range.elapsed_us())
    whole = sum(map(sum, found.values()))
    for name, spent in sorted(found.items(), key=lambda item: -sum(item[1]))[:rows]:
        print(f"{len(spent):5} x {sum(spent):9.1f} us {sum(spent) / whole:6.1%}  {name[:90]}")
    print(f"{sum(map(len, found.values())):5} x {whole:9.1f} us altogether, {len(found)} names")


def filled(model: Any, batch: int, context: int, kv: str | None) -> Any:
    """A cache with random keys and values at `context` positions."""
    cache = model.zq_runner.caches.lease(batch, context + 8, CUDA, BF16, kv)
    if cache is None:  # more than half of the memory that is free
        cache = make_cache(model.config, batch, context + 8, BF16, kv, CUDA)
    for layer in cache.layers:
        for x in (layer.keys, layer.values):
            if kv is None:
                x.normal_()
            else:  # finite codes of either kind
                x.view(torch.uint8).random_(0, 0x7E)
        if kv is not None:
            layer.key_scale.fill_(0.02)
            layer.value_scale.fill_(0.02)
    return cache


def median_ms(call: Callable[[], Any], times: int) -> float:
    spent = []
    for _ in range(times):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
        spent.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(spent)


@torch.no_grad()
def decode(given: argparse.Namespace) -> None:
    batch, context, tokens, kv = given.batch, given.context, given.tokens, given.kv
    if given.torch:
        Around.fits = lambda *_: False  # type: ignore[method-assign]
    model = fill_llama(given.blocks, max(8192, context + 64))
    torch.cuda.reset_peak_memory_stats()
    print(zq.optimize(model, kv=kv, report=True)[1])
    print(f"memory {torch.cuda.memory_allocated() / 1e9:.2f} GB, peak of optimize "
          f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB")  # fmt: skip
    prompt = min(context, 2048)
    ids = torch.randint(3, 128000, (batch, prompt), device=CUDA)

    def text(count: int) -> Any:
        given = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(input_ids=ids, eos_token_id=None, **given)

    text(4)
    print(f"prefill {prompt}: {median_ms(lambda: text(1), 5):.2f} ms with generate around it")
    whole, one = (median_ms(lambda count=count: text(count), 3) for count in (tokens + 1, 1))
    each = (whole - one) / tokens
    print(f"generate after {prompt}: {each:.3f} ms a token, {1e3 * batch / each:.0f} tokens/s")
    runner = model.zq_runner
    cache = filled(model, batch, context, kv)
    token, place = ids[:, -1:], torch.full((1, 1), context, device=CUDA)

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)

    def step() -> Any:
        back()
        return model(input_ids=token, position_ids=place, past_key_values=cache, logits_to_keep=1)

    step()
    step()
    seen = next(reversed(runner.seen.values()), None)
    if seen is None or seen.graph is None:
        print("NOT CAPTURED")
        return
    back()
    stored = ("keys", "values", "key_scale", "value_scale")
    held = sum(getattr(y, x).nbytes for y in cache.layers for x in stored if hasattr(y, x)) / 1e9
    which = "zq" if seen.buffers.own else "torch"
    print(f"attention of {which}; cache {held:.3f} GB, {kv or 'bf16'}")
    spent = []
    for _ in range(50):
        back()  # a replay counts on
        spent.append(median_ms(seen.graph.replay, 1))
    count = launches(seen.graph.replay)
    print(f"graph alone after {context}: {statistics.median(spent):.3f} ms, {count} launches")
    if given.profile:
        back()
        table(seen.graph.replay)
    runner.on = False
    print(f"without graphs: {median_ms(step, 5):.2f} ms")
    print(f"peak memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")


@torch.no_grad()
def encode(batch: int, length: int, show: bool) -> None:
    model = build(transformers.BertConfig(architectures=["BertModel"]), W8A8)
    print(zq.optimize(model, report=True)[1])
    ids = torch.randint(3, 30000, (batch, length), device=CUDA)
    for given in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        for _ in range(PATIENCE + 2):
            model(**given)
        seen = next(reversed(model.zq_runner.seen.values()))
        whole = median_ms(lambda given=given: model(**given), 50)
        graph, count = median_ms(seen.graph.replay, 50), launches(seen.graph.replay)
        print(f"{', '.join(given)}: {whole:.3f} ms, graph alone {graph:.3f} ms, {count} launches")
        if show:
            table(seen.graph.replay)


def main() -> None:
    warnings.simplefilter("always")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("check", "decode", "encode"))
    for name, default in (("blocks", 32), ("batch", 1), ("context", 512), ("tokens", 64), ("length", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kv", choices=("int8", "fp8"))
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--profile", action="store_true")
    given = parser.parse_args()
    if given.command == "check":
        check()
    elif given.command == "decode":
        decode(given)
    else:
        encode(given.batch, given.length, given.profile)


if __name__ == "__main__":
    main()
