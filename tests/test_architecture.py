"""The shape of the code: imports point one way, modules are small, nothing prints or swallows."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import ENVIRONMENT

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted((ROOT / "zq").rglob("*.py"))
LINES = 400


def lint(config: Path) -> subprocess.CompletedProcess:
    program = "import sys; from importlinter.cli import lint_imports_command as c; c(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache", "--config", str(config)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_one_way():
    pytest.importorskip("importlinter")
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_contract_can_break(tmp_path):
    """With two layers swapped the same contract must fail, or it checks nothing."""
    pytest.importorskip("importlinter")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert '"plan"' in text
    swapped = text.replace('"numerics"', '"X"').replace('"plan"', '"numerics"').replace('"X"', '"plan"')
    (tmp_path / "pyproject.toml").write_text(swapped)
    assert "BROKEN" in lint(tmp_path / "pyproject.toml").stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_module(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LINES
    assert ast.get_docstring(tree), "a module says what it is for"
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"line {node.lineno}: a bare except hides defects"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"line {node.lineno}: print belongs to the command line"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/work", "/tmp", "/root", "/home")), "a path of one machine"


@pytest.mark.parametrize(
    "module", ["zq", "zq.errors", "zq.spec", "zq.recipe", "zq.demo", "zq.data", "zq.source", "zq.cli.main"]
)
def test_importing_costs_no_torch(module):
    program = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=False).returncode == 0
