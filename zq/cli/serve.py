"""zq serve: start the server of vLLM or of transformers on a checkpoint, with the flags that it needs."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from zq.cli.console import check_number, command, note, out
from zq.errors import ZqError

VLLM = ("-m", "vllm.entrypoints.openai.api_server")
# `import zq` first: transformers then knows zq's own format.
TRANSFORMERS = ("-c", "import zq; from transformers.cli.transformers import main; main()", "serve")
ENGINES = ("auto", "vllm", "transformers")
OWN = {  # flags of the servers that zq sets, and what sets them
    "--model": "CHECKPOINT",
    "--host": "--host",
    "--port": "--port",
    "--tensor-parallel-size": "--tp",
    "-tp": "--tp",
}
# What transformers needs beside itself for a format.
PACKAGES = {"compressed-tensors": "compressed_tensors", "gptq": "gptqmodel", "awq": "gptqmodel"}


def serve(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a hub id.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- FLAGS]", help="Further flags, for the server itself.")
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", help="vllm, transformers, or auto: vllm where it is installed.")
    ] = "auto",
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port to listen on.")] = 8000,
    tp: Annotated[int, typer.Option("--tp", help="GPUs to split the model between (vllm).")] = 1,
    only_print: Annotated[bool, typer.Option("--print", help="Print the command, do not run it.")] = False,
) -> None:
    """Serve a checkpoint with an OpenAI-compatible API.

    zq serve smol-w4a8 -- --max-model-len 4096

    The server is vLLM's or transformers' own. The checkpoint is checked as `zq doctor` does, and the command
    printed, then run.
    """
    with command():
        from zq.cli.doctor import head_counts, read_layers
        from zq.engines import Target, judge, parse
        from zq.models.find import load_config
        from zq.plugins.vllm import is_active
        from zq.source import resolve

        if engine not in ENGINES:
            raise ZqError(f"--engine {engine} is unknown; allowed: {', '.join(ENGINES)}")
        check_number("--port", port, 1, 65535)
        check_number("--tp", tp, 1, 1024)
        check_flags(more or [])
        chosen = installed(engine)
        if chosen != "vllm" and tp > 1:
            raise ZqError(f"--tp {tp}: the server of transformers does not split a model; leave it out")
        folder = resolve(checkpoint, note)
        format, layers, wrong = read_layers(folder)
        if wrong:
            raise ZqError(f"{folder} cannot be served: {wrong}")
        package = PACKAGES.get(format) if chosen == "transformers" else None
        if package and importlib.util.find_spec(package) is None:
            package = package.replace("_", "-")
            raise ZqError(f"transformers needs {package} for format {format}; pip install {package}")
        known = parse(chosen)
        plugin = chosen == "vllm" and is_active()
        target = Target(engine=chosen, version=known.version, sm=_capability(), tp=tp, plugin=plugin)
        verdict = judge(target, format, layers, head_counts(load_config(folder)))
        if verdict.problems:
            raise ZqError(f"{target} cannot serve {folder}: {verdict.problems[0]}")
        for line in verdict.warnings:
            note(f"{target}: {line}")
        words = server_command(chosen, folder, host, port, tp, any("humming" in w for w in verdict.warnings))
        words += more or []
        out.print(shlex.join(words), soft_wrap=True)
        if not only_print:
            os.execv(words[0], words)


def check_flags(words: list[str]) -> None:
    """Words for the server itself. Raises ZqError for those that zq sets, since it has checked them."""
    if words and not words[0].startswith("-"):
        raise ZqError(f"'{words[0]}' is no option; give flags for the server behind --, such as -- --seed 1")
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        # argparse takes the beginning of a name for the whole
        known = next((own for own in OWN if name == own or (len(name) > 2 and own.startswith(name))), None)
        if known:
            raise ZqError(f"{name} behind -- is set by {OWN[known]}; leave it out")


def installed(engine: str) -> str:
    """The engine to use. Raises ZqError when it, or with auto every one, is missing."""
    have = {
        "vllm": importlib.util.find_spec("vllm") is not None,
        "transformers": all(importlib.util.find_spec(name) for name in ("fastapi", "uvicorn")),
    }
    if engine == "auto":
        found = next((name for name, there in have.items() if there), None)
        if found is None:
            raise ZqError("no server is installed; pip install vllm, or pip install 'transformers[serving]'")
        return found
    if not have[engine]:
        package = "vllm" if engine == "vllm" else "'transformers[serving]'"
        raise ZqError(f"the server of {engine} is not installed; pip install {package}")
    return engine


def server_command(engine: str, folder: Path, host: str, port: int, tp: int, humming: bool) -> list[str]:
    """The words of a command that needs no zq to run, except for zq's own format (and real W4A8 in vLLM)."""
    address = ["--host", host, "--port", str(port)]
    if engine == "transformers":
        return [sys.executable, *TRANSFORMERS, str(folder), *address]
    words = [sys.executable, *VLLM, "--model", str(folder), *address]
    words += ["--tensor-parallel-size", str(tp)] * (tp > 1)
    return words + ["--linear-backend", "humming"] * humming


def _capability() -> int:
    """Compute capability of the first GPU times ten; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
