"""zq: quantize, evaluate, generate, inspect."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from zq import __version__
from zq.cli import (
    bench,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    kernels,
    quantize,
    recipes,
    serve,
    sweep,
)
from zq.cli.console import EXIT_CODES, fail

app = typer.Typer(
    name="zq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-training quantization of language models: smaller checkpoints that real engines load, "
    "and what it cost.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items()) + ".",
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
app.command("bench")(bench.bench)
app.command("doctor")(doctor.doctor)
app.command("export")(export.export)
app.command("sweep")(sweep.sweep)
app.command("serve")(serve.serve)
app.add_typer(recipes.app, name="recipes")
app.add_typer(kernels.app, name="kernels")


def main() -> None:
    """Entry point of the console script: a wrong option is one line too, not a box of several."""
    try:
        code: Any = app(standalone_mode=False, prog_name="zq")
    except Exception as error:
        # Typer 0.26 and newer carry their own click, so the class of a usage error is nobody's to import.
        if not hasattr(error, "format_message") or not hasattr(error, "exit_code"):
            raise
        usage: Any = error
        if type(error).__name__ == "NoArgsIsHelpError":  # `zq` alone: the help has been asked for
            usage.show()
        else:
            context = getattr(usage, "ctx", None)
            path = context.command_path if context else "zq"
            fail(f"{usage.format_message().rstrip('. ')}; `{path} --help` lists what there is")
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
