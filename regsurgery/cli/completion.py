"""Completions for arguments and options. Called at every press of the tab key: nothing heavy.

If nothing is offered, shells complete file names.
"""

from __future__ import annotations


def models(incomplete: str) -> list[tuple[str, str]]:
    """`demo`, the models that bundled recipes were made for, and prefixes of timm and open_clip names."""
    from regsurgery.families import FAMILIES
    from regsurgery.recipe import bundled_recipes

    offered = {"demo": "a small bundled model", "timm:": "a timm model", "open_clip:": "ARCH/TAG in open_clip"}
    for name, recipe in bundled_recipes().items():
        offered.setdefault(recipe.model, f"recipe {name}")
    begins: dict[str, list[str]] = {}
    for family in FAMILIES:
        if family.library == "timm":
            for member in family.members:
                begins.setdefault(f"timm:{member.partition('*')[0]}", []).append(family.name)
    return _matching(offered | {value: ", ".join(names) for value, names in begins.items()}, incomplete)


def recipes(incomplete: str) -> list[tuple[str, str]]:
    """Names of bundled recipes."""
    from regsurgery.recipe import bundled_recipes

    return _matching({name: recipe.model for name, recipe in bundled_recipes().items()}, incomplete)


def lists(incomplete: str) -> list[tuple[str, str]]:
    """Names of bundled lists of models."""
    from regsurgery.surveying.listed import BUNDLED

    return _matching(dict.fromkeys(BUNDLED, "models that others published"), incomplete)


def modes(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--mode`."""
    from regsurgery.recipe import MODES

    return _matching(dict.fromkeys(MODES, ""), incomplete)


def formats(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--format`."""
    from regsurgery.formats import FORMATS

    return _matching(dict.fromkeys(FORMATS, ""), incomplete)


def libraries(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--library`."""
    from regsurgery.formats import LIBRARIES

    return _matching(dict.fromkeys(LIBRARIES, ""), incomplete)


def devices(incomplete: str) -> list[tuple[str, str]]:
    """Values of `--device-map`."""
    return _matching({"auto": "accelerate places the layers", "cuda": "", "cpu": ""}, incomplete)


def _matching(offered: dict[str, str], incomplete: str) -> list[tuple[str, str]]:
    return [(value, help) for value, help in offered.items() if value.startswith(incomplete)]
