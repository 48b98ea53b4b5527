"""zq serve: start the server of vLLM or of transformers on a checkpoint, with the flags that it needs."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zq.cli.console import check_number, command, note, out
from zq.errors import ZqError

if TYPE_CHECKING:
    from zq.engines import Layer, Target

VLLM = ("-m", "vllm.entrypoints.openai.api_server")
TRANSFORMERS = ("-m", "transformers.cli.transformers", "serve")
# transformers knows zq's own format after `import zq`; no other needs it.
WITH_ZQ = ("-c", "import zq; from transformers.cli.transformers import main; main()", "serve")
PACKED_ZEROS = (  # from Python they load, with CompressedTensorsConfig(dequantize=True)
    "its server cannot load the zero points of compressed-tensors; use zq export --to zq, or --engine vllm"
)
ENGINES = ("auto", "vllm", "transformers")
SERVERS = {  # modules that they are made of
    "vllm": ("vllm",),
    "transformers": ("fastapi", "uvicorn", "openai", "accelerate"),
}
INSTALL = {"vllm": "pip install vllm", "transformers": "pip install 'transformers[serving]'"}
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
        from zq.cli.doctor import head_counts, read_layers, restated
        from zq.engines import judge
        from zq.models.find import load_config
        from zq.source import resolve

        if engine not in ENGINES:
            raise ZqError(f"--engine {engine} is unknown; allowed: {', '.join(ENGINES)}")
        if not re.fullmatch(r"[\w:][\w.:%-]*", host):
            raise ZqError(f"--host '{host}' is no address; give an IP address or the name of a host")
        check_number("--port", port, 1, 65535)
        check_number("--tp", tp, 1, 1024)
        check_flags(more or [])
        folder = resolve(checkpoint, note)
        format, layers, wrong = read_layers(folder)
        if wrong:
            raise ZqError(f"{folder} cannot be served: {wrong}")
        chosen, missing = chosen_server(engine, format)
        if missing and not only_print:
            raise ZqError(missing)
        if chosen != "vllm" and tp > 1:
            raise ZqError(f"--tp {tp}: the server of transformers does not split a model; leave it out")
        target = _target(chosen, tp, format, there=not missing)
        if missing:
            note(f"{missing}; checked for {target}")
        heads = head_counts(load_config(folder))
        verdict = judge(target, format, layers, heads, restated(folder, layers), "zq export")
        if chosen == "transformers" and format == "compressed-tensors" and any(map(_has_zeros, layers)):
            raise ZqError(f"{target} cannot serve {folder}: {PACKED_ZEROS}")
        if verdict.problems:
            raise ZqError(f"{target} cannot serve {folder}: {verdict.refusal}")
        for line in verdict.warnings:
            note(f"{target}: {line}")
        humming = any("humming" in line for line in verdict.warnings)
        words = server_command(chosen, folder, host, port, tp, humming, with_zq=format == "zq")
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


def chosen_server(engine: str, format: str) -> tuple[str, str]:
    """(the server to use, what it lacks here or ""). Raises ZqError when with auto every one is missing."""
    if engine == "auto":
        engine = next((name for name, modules in SERVERS.items() if _are_there(*modules)), "")
    if not engine:
        raise ZqError(
            f"no server is installed; {' or '.join(INSTALL.values())}, or see its command (--engine vllm "
            "--print)"
        )
    if not _are_there(*SERVERS[engine]):
        return engine, f"the server of {engine} is not installed here; {INSTALL[engine]}"
    package = PACKAGES.get(format) if engine == "transformers" else None
    if package and not _are_there(package):
        package = package.replace("_", "-")
        return engine, f"transformers needs {package} for format {format}; pip install {package}"
    return engine, ""


def _has_zeros(layer: Layer) -> bool:
    return layer.scheme is not None and not layer.scheme.weights.symmetric


def _are_there(*modules: str) -> bool:
    return all(importlib.util.find_spec(name) for name in modules)


def server_command(
    engine: str, folder: Path, host: str, port: int, tp: int, humming: bool, with_zq: bool
) -> list[str]:
    """The words of a command that needs no zq to run, except for zq's own format (and real W4A8 in vLLM)."""
    address = ["--host", host, "--port", str(port)]
    if engine == "transformers":
        return [sys.executable, *(WITH_ZQ if with_zq else TRANSFORMERS), str(folder), *address]
    words = [sys.executable, *VLLM, "--model", str(folder), *address]
    words += ["--tensor-parallel-size", str(tp)] * (tp > 1)
    return words + ["--linear-backend", "humming"] * humming


def _target(engine: str, tp: int, format: str, there: bool) -> Target:
    """This very machine; without the server what `--for` takes by default, since it will run elsewhere, where
    nobody knows of zq unless the format is its own."""
    from zq.engines import parse
    from zq.plugins.vllm import is_active, vllm_version

    beside = is_active() if there else format == "zq"
    known = replace(parse(engine), tp=tp, plugin=engine == "vllm" and beside)
    if not there:
        return known
    found = vllm_version() if engine == "vllm" else version("transformers")
    said = known.version if found == "unknown" else found.partition("+")[0]
    return replace(known, version=said, sm=_capability())


def _capability() -> int:
    """Compute capability of the first GPU times ten; 0 without one."""
    import torch

    if not torch.cuda.is_available():
        return 0
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
