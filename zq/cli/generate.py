"""zq generate: text from a checkpoint, to see with one's own eyes that it still works."""

from __future__ import annotations

from typing import Annotated

import typer

from zq.cli.console import command, note, print_json, torch_device
from zq.errors import ZqError


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, a hub id, or `demo`.")],
    prompt: Annotated[str, typer.Argument(help="What to continue, or to answer.")],
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option("--temperature", help="0: greedy.")] = 0.0,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--raw", help="Use the chat template. Default: when there is one."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of sampling.")] = 0,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print prompt and text as JSON.")] = False,
) -> None:
    """Generate text with a checkpoint, quantized or not; it streams as it comes."""
    with command(json):
        from zq.source import resolve

        if max_tokens < 1 or temperature < 0:
            raise ZqError("--max-tokens must be at least 1 and --temperature at least 0")
        if not prompt:
            raise ZqError("the prompt is empty; give some text")
        place = torch_device(device)
        folder = resolve(checkpoint, note)
        import torch
        from transformers import TextStreamer

        from zq.models.find import find_family
        from zq.plan import load_tokenizer
        from zq.runtime.load import load

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
        model = load(folder, device=place)
        torch.manual_seed(seed)
        sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
        streamer = None if json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = model.generate(
            **inputs.to(place),
            max_new_tokens=max_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            **sampling,
        )
        if json:
            new = ids[0, inputs["input_ids"].shape[1] :]
            text = tokenizer.decode(new, skip_special_tokens=True)
            print_json({"prompt": prompt, "text": text, "tokens": new.tolist()})
