"""zq recipes: the shipped recipes; every scheme shortcut of `zq quantize` is the name of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from zq.cli.console import command, out, print_json

app = typer.Typer(help="List and show recipes: the YAML files behind --w8a8, --w4a8 and the others.")


@app.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Without a subcommand: list."""
    if context.invoked_subcommand is None:
        list_recipes()


@app.command("list")
def list_recipes(
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Names of the shipped recipes and what they are for."""
    with command(json):
        from zq.recipe import load, preset_about, presets, shipped

        found = [(load(name).name, load(name).about, f"--{name}") for name in shipped()]
        found += [(name, preset_about(name), f"--preset {name}") for name in presets()]
        if json:
            return print_json([{"name": n, "about": about, "option": option} for n, about, option in found])
        table = Table("recipe", "what it does", "option", box=None, header_style="bold")
        for row in found:
            table.add_row(*row)
        out.print(table)


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A shipped recipe or preset, or a .yaml file.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Print the YAML of a recipe, after checking it."""
    with command(json):
        from zq.recipe import Recipe, presets, shipped, source_text

        if name in presets():
            return _print_preset(name, as_json=json)
        text, where = source_text(name)
        recipe = Recipe.parse(text, where, Path(name).stem)
        if name not in shipped():  # those are known to be right, and the methods need torch
            from zq.methods import resolve_all

            resolve_all(recipe)
        if json:
            return print_json(
                {"name": recipe.name, "about": recipe.about, "digest": recipe.digest, "yaml": text}
            )
        typer.echo(text.rstrip())


def _print_preset(name: str, as_json: bool) -> None:
    from zq.recipe import preset_about, preset_text

    text = preset_text(name)
    if as_json:
        return print_json({"name": name, "about": preset_about(name), "yaml": text})
    typer.echo(text.rstrip())
