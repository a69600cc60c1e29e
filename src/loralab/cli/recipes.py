"""Commands about shipped recipes."""

from typing import Annotated

import typer

from loralab.cli.options import AsJson, Overrides, Recipe
from loralab.console.screen import console, print_json, shown, table

recipes_app = typer.Typer(help="Shipped recipes: list, show, copy, compare, schema.", no_args_is_help=False)


@recipes_app.callback(invoke_without_command=True)
def recipes_main(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        recipes_ls()


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from loralab.spec.recipes import shipped

    rows = shipped()
    if as_json:
        print_json([{"name": name, "description": text} for name, text in rows])
    else:
        console().print(table(("recipe", "what it is for"), rows))


@recipes_app.command("show")
def recipes_show(
    recipe: Recipe, overrides: Overrides = None, resolved: Annotated[bool, typer.Option("--resolved")] = False
) -> None:
    """Print a recipe; with --resolved, every key with its value, source and meaning."""
    from loralab.spec.recipes import explain, find, preview

    if not resolved:
        print(find(recipe).read_text(encoding="utf-8"), end="")
        return
    items = explain(recipe, preview(recipe, overrides or []))
    console().print(
        table(("key", "value", "from", "meaning"), [(i.key, shown(i.value), i.source, i.meaning) for i in items])
    )


@recipes_app.command("cp")
def recipes_cp(recipe: Recipe, to: Annotated[str, typer.Argument(help="New file.")]) -> None:
    """Copy a recipe, to own and change it."""
    from loralab.spec.recipes import copy

    console().print(f"wrote {copy(recipe, to)}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from loralab.spec.recipes import schema

    print_json(schema())


@recipes_app.command("diff")
def recipes_diff(first: Recipe, second: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare two recipes key by key; the overrides apply to both."""
    from loralab.spec.recipes import diff, find, preview, read

    for recipe in (first, second):
        find(recipe)
    a, b = (read(recipe, preview(recipe, overrides or [])) for recipe in (first, second))
    rows = diff(a, b)
    if as_json:
        print_json([{"key": key, first: a, second: b} for key, a, b in rows])
    else:
        console().print(table(("key", first, second), rows))
