"""The documents agree with the code: reference, links, commands, recipes."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.command import ENVIRONMENT, run
from zq.recipe import Recipe, recipe_folder, shipped

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, *languages: str) -> list[str]:
    return [
        body for _, language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages
    ]


def commands(page: Path) -> list[list[str]]:
    """The words after `zq` of every zq command in the page's shell blocks."""
    found = []
    for block in blocks(page, "", "bash", "sh", "console", "shell", "text"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"\s*(?:\$ )?(?:\w+=\S* )*(?:\S*/)?zq\s+(?=[a-z-])(.*)", line)
            if match and "[OPTIONS]" not in line:
                found.append(shlex.split(match[1], comments=True))
    return found


def reference(*args: str, width: str = "80") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "cli_reference.py"), *args],
        env={**ENVIRONMENT, "COLUMNS": width},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_cli_reference_is_up_to_date():
    done = reference("--check", width="33")
    assert done.returncode == 0, done.stderr


def test_a_stale_reference_fails_and_shows_the_difference(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cli_reference

    page = tmp_path / "cli.md"
    monkeypatch.setattr(cli_reference, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["cli_reference.py", "--check"])
    page.write_text(cli_reference.page().replace("`--seed INTEGER`", "`--sead INTEGER`"))
    with pytest.raises(SystemExit) as stale:
        cli_reference.main()
    assert "-| `--sead INTEGER`" in str(stale.value.code)
    assert "+| `--seed INTEGER`" in str(stale.value.code)
    monkeypatch.setattr(sys, "argv", ["cli_reference.py"])
    cli_reference.main()
    assert page.read_text() == (ROOT / "docs" / "cli.md").read_text()


def test_the_reference_has_every_option_of_the_help():
    """Against what Typer itself offers, which the generator does not ask."""
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    groups = ("recipes list", "recipes show", "kernels list", "kernels build", "kernels bundle")
    for command in ("quantize", "eval", "generate", "inspect", "sweep", *groups):
        section = text.partition(f"\n## zq {command}\n")[2].partition("\n## ")[0]
        shown = run(*command.split(), "--help").ok().out
        options = set(re.findall(r"(?<![\w-])--[a-z][\w-]+", shown)) - {"--help"}
        assert options
        for option in options:
            assert option in section, f"{option} of zq {command} is not in docs/cli.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path) if path else page
        assert linked.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor and linked.suffix == ".md":
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{page.name} links to {target}, which has no such heading"


@pytest.fixture
def parsed(monkeypatch) -> list[str]:
    """The program with commands that only note that they were understood."""
    from zq.cli.kernels import app as kernels
    from zq.cli.main import app
    from zq.cli.recipes import app as recipes

    seen: list[str] = []

    def noting(command):
        return functools.wraps(command)(lambda *args, **options: seen.append(command.__name__))

    for group in (app, kernels, recipes):
        for info in group.registered_commands:
            monkeypatch.setattr(info, "callback", noting(info.callback))
    assert isinstance(app, typer.Typer)
    return seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_documents_are_understood(page, parsed):
    for words in commands(page):
        done = run(*words)
        assert done.code == 0, f"{page.name}: zq {' '.join(words)}: {done.err}"


def test_the_check_of_commands_can_fail(parsed, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```bash\n$ HF_HUB_OFFLINE=1 zq quantize demo \\\n   --w9a9 -o x  # no\nzq recipes list\n```\n"
    )
    wrong, right = commands(page)
    assert wrong == ["quantize", "demo", "--w9a9", "-o", "x"]
    assert run(*wrong).code == 2
    assert parsed == []
    assert run(*right).code == 0
    assert parsed == ["list_recipes"]


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_is_in_the_documents(name):
    assert re.search(rf"\b{name}\b", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_says_what_it_is_for(name):
    text = (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ")
    assert Recipe.parse(text).about


def test_recipes_in_the_documents_are_recipes():
    for page in PAGES:
        for block in blocks(page, "yaml"):
            if block.startswith(("rules:", "about:", "name:", "extends:", "#")) and "rules:" in block:
                Recipe.parse(block, page.name)
