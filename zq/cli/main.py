"""zq: quantize, evaluate, generate, inspect."""

from __future__ import annotations

from typing import Annotated

import typer

from zq import __version__
from zq.cli import evaluate, generate, inspect, quantize, recipes

app = typer.Typer(
    name="zq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training quantization of language models: smaller checkpoints that real engines load, "
    "and what it cost.",
    epilog="Exit codes: 0 done, 1 internal error, 2 bad input, 3 audit failed, 75 interrupted and resumable.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"zq {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of zq itself."""


app.command("quantize")(quantize.quantize)
app.command("eval")(evaluate.evaluate)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.add_typer(recipes.app, name="recipes")


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
