"""`regsurgery recipes`: list, show, validate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regsurgery.cli.completion import recipes
from regsurgery.cli.ending import print_error
from regsurgery.cli.options import AsJson, Quiet
from regsurgery.errors import EXIT_USER_ERROR, RecipeError
from regsurgery.plain import in_blocks, plain, plural

app = typer.Typer(
    name="recipes",
    help="List, show and check recipes (default: list).",
    epilog="Example: regsurgery recipes show vit-tiny",
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _recipes(context: typer.Context, as_json: AsJson = False, quiet: Quiet = False) -> None:
    if context.invoked_subcommand is None:
        list_recipes(as_json, quiet)
    elif as_json or quiet:
        name = context.invoked_subcommand
        option = "--json" if as_json else "--quiet"
        raise typer.BadParameter(f"write it after {name}: regsurgery recipes {name} {option}", param_hint=option)


@app.command("list", epilog="Example: regsurgery recipes list --json")
def list_recipes(as_json: AsJson = False, quiet: Quiet = False) -> None:
    """List the bundled recipes."""
    from regsurgery.recipe import bundled_recipes

    found = bundled_recipes()
    if as_json:
        print(json.dumps({name: recipe.as_dict() for name, recipe in found.items()}, indent=2))
    elif not quiet:
        from regsurgery.cli.tables import recipe_table

        recipe_table(found)


@app.command(epilog="Example: regsurgery recipes show demo > mine.yaml")
def show(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Name of a bundled recipe, a recipe file, or USER/NAME of a patched repository.",
            metavar="RECIPE",
            show_default=False,
            autocompletion=recipes,
        ),
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Print a recipe, including every default."""
    from regsurgery.hub.recipe import named_recipe

    found = named_recipe(recipe)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    elif not quiet:
        print(plain(found.to_yaml()), end="")


@app.command(epilog="Example: regsurgery recipes validate mine.yaml")
def validate(
    files: Annotated[list[Path], typer.Argument(help="Recipe files.", metavar="FILE", show_default=False)],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check recipe files. Reports errors with their location; exit code 2 if there are any.

    Use patch --dry-run to check them against a model.
    """
    from regsurgery.recipe import read_recipe

    problems: dict[str, str | None] = {}
    for file in files:
        try:
            recipe = read_recipe(file)
        except RecipeError as error:
            problems[str(file)] = str(error)
            print_error(str(error))
        else:
            problems[str(file)] = None
            if not (as_json or quiet):
                neurons = f"{plural(recipe.num_neurons, 'register neuron')} in {in_blocks(recipe.register_neurons)}"
                print(f"{plain(str(file))}: valid; {neurons}, mode {recipe.mode}")
    valid = not any(problems.values())
    if as_json:
        each = [{"file": file, "valid": problem is None, "error": problem} for file, problem in problems.items()]
        print(json.dumps({"valid": valid, "recipes": each}, indent=2))
    if not valid:
        raise typer.Exit(EXIT_USER_ERROR)
