"""A recipe by name: a file, a bundled recipe, or that of a patched repository on the Hub, without its weights."""

from __future__ import annotations

import os
import re

from regsurgery.checkpoints.download import snapshot
from regsurgery.errors import RecipeError
from regsurgery.progress import Progress
from regsurgery.recipe import RECIPE_NAME, Recipe, bundled_recipes, find_recipe, read_recipe

REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
FILES = (".yaml", ".yml")


def named_recipe(name: str, progress: Progress | None = None) -> Recipe:
    """A recipe file, a bundled recipe, or `USER/NAME` or `USER/NAME@REVISION` on the Hub.

    Raises:
        RecipeError: there is none of that name, or it is malformed.
        ModelNotFoundError: the repository does not exist, or cannot be reached.
    """
    found = REPOSITORY.fullmatch(name)
    if found is None or name.endswith(FILES) or name in bundled_recipes() or os.path.exists(name):
        return find_recipe(name)
    folder, commit = snapshot(found["repo"], name, found["revision"], [RECIPE_NAME])
    path = folder / RECIPE_NAME
    if not path.is_file():
        raise RecipeError(
            f"{name}: has no {RECIPE_NAME}, so it is no repository that regsurgery push wrote; give one, or a recipe "
            "file"
        )
    if progress is not None:
        progress.say(f"recipe: that of {found['repo']} on the Hub, revision {commit}")
    return read_recipe(path)
