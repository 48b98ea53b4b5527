"""zq eval: what quantization cost, measured on text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from zq.cli.console import check_number, command, err, facts, note, out, print_json, torch_device
from zq.errors import ZqError


def evaluate(  # noqa: PLR0913 (a command line is its options)
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder, quantized or not, a hub id, or `demo`.")
    ],
    against: Annotated[
        str | None, typer.Option("--against", help="The original, to measure the divergence from it.")
    ] = None,
    text: Annotated[
        str, typer.Option("--text", help="bundled-eval, a .txt, .jsonl or .parquet file, or hf:DATASET.")
    ] = "bundled-eval",
    windows: Annotated[int, typer.Option("--windows", help="Windows of text; for encoders, sentences.")] = 8,
    length: Annotated[int, typer.Option("--length", help="Tokens per window; for encoders, at most.")] = 512,
    start: Annotated[float, typer.Option("--start", help="Fraction of the text to skip, 0 to 1.")] = 0.0,
    batch: Annotated[int, typer.Option("--batch", help="Windows per forward pass.")] = 1,
    kv: Annotated[
        str | None, typer.Option("--kv", help="Round keys and values as a cache of int8 or fp8 does.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:N, or auto.")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Perplexity of a model, and with --against how far it is from the original.

    Decoders: KL(P_original || P_quantized) per token, top-1 agreement, both perplexities. Encoders: cosine
    of the last hidden state. Windows are independent, consecutive, and get no BOS token. --kv concerns
    the model, not the original: `zq eval M --against M --kv int8` is the cost of the cache alone.
    """
    with command(json):
        from zq.source import resolve

        check_number("--batch", batch, 1)
        check_number("--windows", windows, 1)
        check_number("--length", length, 2)
        check_number("--start", start, 0, 1)
        place = torch_device(device)
        folder = resolve(checkpoint, note)
        reference = resolve(against, note) if against else None
        options = {"windows": windows, "length": length, "start": start, "batch": batch, "quiet": json}
        result = measure(folder, reference, text, place, kv=kv, **options)
        asked = {"checkpoint": str(folder), "against": reference and str(reference), "text": text, "kv": kv}
        result = asked | result
        if json:
            return print_json(result)
        out.print(_table(result))


def measure(  # noqa: PLR0913 (what the command line can say)
    folder: Path,
    reference: Path | None,
    text: str,
    device: str,
    *,
    windows: int,
    length: int,
    start: float,
    batch: int,
    kv: str | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Load, run, and return the report of zq.eval as a dict with its kind."""
    from zq.data import load_text
    from zq.models.find import find_family, find_positions, load_tokenizer
    from zq.runtime.cache import CODES
    from zq.runtime.load import load, load_decoder

    encoder = find_family(folder).encoder
    if reference is not None and find_family(reference).encoder != encoder:
        raise ZqError(f"{folder} and {reference} are not the same kind of model; check --against")
    if encoder and reference is None:
        raise ZqError(f"{folder} is an encoder, which has no perplexity; give the original with --against")
    if kv is not None and kv not in CODES:
        raise ZqError(f"--kv {kv} is unknown; allowed: {', '.join(CODES)}")
    if kv is not None and encoder:
        raise ZqError(f"{folder} is an encoder, which keeps no keys and values; leave out --kv")
    limit = min(find_positions(f) or length for f in (folder, reference or folder))
    if length > limit and not encoder:
        raise ZqError(
            f"--length {length} is more than the {limit} positions of the model; give at most {limit}"
        )
    content = load_text(text)
    tokenizer = load_tokenizer(reference or folder)
    loaded = load if encoder else load_decoder
    candidate = loaded(folder, device=device, kernels=False)  # figures mean the simulation
    original = loaded(reference, device=device, kernels=False) if reference else None

    def progress(steps: int) -> Any:
        bar = iter(track(range(steps), "windows", console=err, transient=True, disable=quiet))
        return lambda done, total: next(bar, None)

    if encoder:
        from zq.eval.adapt import encode_sentences, encoder_states, split_sentences
        from zq.eval.encoder import encoder_agreement

        sentences = split_sentences(content[int(start * len(content)) :], windows)
        ids, mask = encode_sentences(sentences, tokenizer, min(length, limit))
        report = encoder_agreement(
            encoder_states(original),
            encoder_states(candidate),
            ids,
            mask,
            batch,
            progress(-(-windows // batch)),
        )
        return {"kind": "encoder", **report.to_dict()}

    from zq.data import evaluation_windows
    from zq.eval.adapt import decoder_logits
    from zq.eval.divergence import divergence
    from zq.eval.perplexity import perplexity

    vocabulary = candidate.config.vocab_size
    tokens = evaluation_windows(content, tokenizer, windows, length, start, vocab_size=vocabulary)
    steps = progress(-(-windows // batch))
    if original is None:
        return {
            "kind": "perplexity",
            **perplexity(decoder_logits(candidate, kv), tokens, batch, steps).to_dict(),
        }
    report = divergence(decoder_logits(original), decoder_logits(candidate, kv), tokens, batch, steps)
    return {"kind": "divergence", **report.to_dict()}


def _table(result: dict[str, Any]) -> Table:
    def pm(key: str, digits: int = 4) -> str:
        error = result.get(f"{key}_standard_error")
        return f"{result[key]:.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")

    table = facts()
    if result["kind"] == "perplexity":
        table.add_row("perplexity", f"{result['ppl']:.3f}")
        table.add_row("nats per token", pm("nll"))
    elif result["kind"] == "divergence":
        table.add_row("perplexity, original", f"{result['reference']['ppl']:.3f}")
        table.add_row("perplexity, this", f"{result['candidate']['ppl']:.3f}")
        table.add_row("mean KL", pm("kl") + " nats per token")
        shares = f"{result['kl_p50']:.4f} / {result['kl_p99']:.3f} / {result['kl_p999']:.3f}"
        table.add_row("KL, 50 / 99 / 99.9 %", shares)
        table.add_row("same top-1 token", f"{100 * result['top1_agreement']:.2f} %")
    else:
        table.add_row("cosine, tokens", pm("token_mean", 5) + f", min {result['token_min']:.4f}")
        table.add_row("cosine, sentences", f"{result['sentence_mean']:.5f}, min {result['sentence_min']:.4f}")
    source = result if result["kind"] != "divergence" else result["candidate"]
    count = f"{source['tokens']} tokens, " + (
        f"{source['sequences']} sequences"
        if result["kind"] == "encoder"
        else f"{source['windows']} windows of {source['length']}"
    )
    table.add_row("on", f"{result['text']}: {count}")
    if result["kv"]:
        table.add_row("keys and values", f"{result['kv']}, a scale for each token of each head")
    table.add_row("conventions", result["conventions"])
    return table
