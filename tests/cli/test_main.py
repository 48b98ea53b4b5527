"""The program as a whole: help, version, exit codes, what it costs to start."""

from __future__ import annotations

import subprocess
import sys

import pytest

import zq
from tests.command import ENVIRONMENT, run, spawn

COMMANDS = ("quantize", "eval", "generate", "inspect", "recipes")


@pytest.mark.parametrize(
    "args", [("--help",), ("quantize", "--help"), ("recipes", "list"), ("recipes", "show", "w4a8")]
)
def test_what_needs_no_model_imports_no_torch(args):
    program = f"""
import sys
from zq.cli.main import main
sys.argv = ["zq", *{args!r}]
try:
    main()
finally:
    heavy = {{"torch", "transformers", "safetensors", "huggingface_hub", "datasets"}} & set(sys.modules)
    if heavy:
        sys.exit(f"imported {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_lists_the_commands_and_the_exit_codes():
    text = run("--help").ok().out
    for command in COMMANDS:
        assert command in text
    for code in ("0 done", "1 internal error", "2 bad input", "3 audit failed", "75 interrupted"):
        assert code in " ".join(text.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    done = run(command, "-h").ok()
    assert f"zq {command}" in done.out
    assert done.err == ""


def test_version():
    assert run("--version").ok().out == f"zq {zq.__version__}\n"


def test_python_m_zq():
    done = spawn("--version").ok()
    assert (done.out, done.err) == (f"zq {zq.__version__}\n", "")
    assert "Usage: zq " in spawn("--help").ok().out


def test_alone_it_shows_the_help():
    done = run()
    assert "Usage: zq" in done.out + done.err
    assert done.code == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quantise",), "No such command 'quantise'"),
        (("quantize", "--w9a9"), "No such option: --w9a9"),
        (("quantize",), "Missing argument"),
        (("eval", "x", "--windows", "many"), "--windows"),
        (("recipes", "shew"), "No such command 'shew'"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_wrong_command_line_is_one_line(args, message):
    done = run(*args)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert message in done.err
    assert "--help` lists what there is" in done.err
    assert done.err.count("\n") == 1
