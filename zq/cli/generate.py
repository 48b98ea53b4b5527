"""zq generate: text from a checkpoint, to see with one's own eyes that it still works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from zq.cli.console import MAX_SEED, check_number, command, note, print_json, torch_device
from zq.errors import ZqError

if TYPE_CHECKING:
    from torch import Tensor


def generate(  # noqa: PLR0913 (a command line is its options)
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or `demo`.")],
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy; else 0.01 or more.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the chat template. Default: when there is one."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    kv: Annotated[
        str | None, typer.Option("--kv", help="Keep keys and values in int8 or fp8. Default: 16 bits.")
    ] = None,
    optimize: Annotated[
        bool,
        typer.Option("--optimize/--no-optimize", help="Run fused, or the simulation that zq eval measures."),
    ] = True,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Say what was fused and what was not, and why.")
    ] = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print prompt and text as JSON.")] = False,
) -> None:
    """Generate text with a checkpoint, quantized or not; it streams as it comes."""
    with command(json):
        from zq.source import resolve

        check_number("--max-tokens", max_tokens, 1)
        check_number("--temperature", temperature, 0.01 if temperature > 0 else 0)
        check_number("--seed", seed, 0, MAX_SEED)
        if not prompt:
            raise ZqError("the prompt is empty; give some text")
        place = torch_device(device)
        folder = resolve(checkpoint, note)
        import torch
        from transformers import TextStreamer

        from zq.models.find import find_family, find_positions, load_tokenizer
        from zq.runtime.cache import CODES, cache_argument, make_cache
        from zq.runtime.load import load_decoder

        if kv is not None and kv not in CODES:
            raise ZqError(f"--kv {kv} is unknown; allowed: {', '.join(CODES)}")
        if find_family(folder).encoder:
            raise ZqError(
                f"{folder} is an encoder and generates no text; compare it with `zq eval --against`"
            )
        tokenizer = load_tokenizer(folder)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat and not has_template:
            raise ZqError(f"{folder} has no chat template; use --raw")
        if has_template and chat is not False:
            messages = [{"role": "user", "content": prompt}]
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            inputs = tokenizer(prompt, return_tensors="pt")
        _check_prompt(inputs["input_ids"], max_tokens, find_positions(folder), str(folder))
        model = load_decoder(folder, device=place, kernels=optimize)
        if int(inputs["input_ids"].max()) >= model.config.vocab_size:
            raise ZqError(
                f"{folder}: the tokenizer gives token id {int(inputs['input_ids'].max())}, the model's "
                f"vocab_size is {model.config.vocab_size}; use the tokenizer of this very model"
            )
        options: dict[str, Any] = {}
        if optimize:
            from zq.runtime.optimize import optimize as make_fast

            model, fused = make_fast(model, kv=kv, report=True)
            if verbose:
                note(str(fused))
        elif kv is not None:
            length = inputs["input_ids"].shape[1] + max_tokens
            options[cache_argument(model)] = make_cache(model.config, 1, length, model.dtype, kv, place)
        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        streamer = None if json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = model.generate(
            **inputs.to(place),
            max_new_tokens=max_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **options,
        )
        if json:
            new = ids[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True)
            print_json({"prompt": prompt, "text": text, "tokens": new.tolist()})


def _check_prompt(ids: Tensor, max_tokens: int, limit: int | None, where: str) -> None:
    """Refuse a prompt [1, L] without tokens, and one that leaves no positions for the answer."""
    length = ids.shape[1]
    if not length:
        raise ZqError("the prompt has no tokens; give some text")
    if limit is not None and length + max_tokens > limit:
        raise ZqError(
            f"{where} has {limit} positions; a prompt of {length} tokens and --max-tokens {max_tokens} need "
            f"{length + max_tokens}: shorten them"
        )
