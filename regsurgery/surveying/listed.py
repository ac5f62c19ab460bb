"""The list of a survey: which models, and what others have published about them. Strict YAML, as recipes are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from regsurgery.errors import UserError, did_you_mean
from regsurgery.modes import MODES, SHIFT
from regsurgery.options import READING
from regsurgery.recipe import bundled_recipes
from regsurgery.strict_yaml import check_keys, check_one_of, check_schema, mapping, shown, text_of

SCHEMA = 1
BUNDLED = ("published",)  # lists that come along, by name
LOADING = (*READING, "revision", "tower")  # fields of `LoadOptions` that an entry may set
NUMBERS = ("original", "patched")
# Figure -> the keys of an entry of `expected` that hold what was published.
FIGURES = {
    "verdict": ("value",),
    "neurons": ("recipe",),
    "num_neurons": ("patched",),
    "emergence_block": ("value",),
    "largest_norm": NUMBERS,
    "lost": NUMBERS,
    "accuracy": NUMBERS,
}
TYPES: Mapping[str, type | tuple[type, ...]] = {
    "ema": bool,
    "value": (str, int),
    **dict.fromkeys(NUMBERS, (int, float)),
}


@dataclass(frozen=True)
class Expected:
    """A published figure.

    Attributes:
        figure: one of `FIGURES`.
        source: who published it.
        mode: of regsurgery, whose measured figure stands beside it.
        images: what it was measured on; `note`: anything else.
        value: of the original alone; `original` and `patched`: before and after; `recipe`: the name of a bundled recipe
            that has the neurons. Only those that `FIGURES` names.
    """

    figure: str
    source: str
    mode: str = SHIFT.name
    images: str = ""
    note: str = ""
    value: str | int | None = None
    original: float | None = None
    patched: float | None = None
    recipe: str | None = None


@dataclass(frozen=True)
class Entry:
    """A model of the list.

    Attributes:
        name: unique in the list, also as `slug`.
        model: MODEL, as `doctor` takes it.
        loading: fields of `LoadOptions`, see `LOADING`.
    """

    name: str
    model: str
    loading: Mapping[str, Any]
    expected: tuple[Expected, ...] = ()

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return re.sub(r"[^\w.+-]+", "-", self.name, flags=re.ASCII).strip(".-") or "model"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, as the list has it."""
        expected = [
            {key: value for key, value in asdict(one).items() if value not in (None, "")} for one in self.expected
        ]
        return {"name": self.name, "model": self.model, **self.loading, "expected": expected}


def read_list(listed: str | Path) -> list[Entry]:
    """The models of a list: a file, or one of `BUNDLED`.

    Raises:
        UserError: it cannot be read, or is not a list; the message names the entry and the key.
    """
    if str(listed) in BUNDLED:
        text = (resources.files("regsurgery.surveying") / f"{listed}.yaml").read_text("utf-8")
        return parse_list(text, f"{listed}.yaml")
    path = Path(listed)
    if not path.exists():
        raise UserError(
            f"{listed}: no such list file, and no bundled list of that name{did_you_mean(str(listed), list(BUNDLED))}; "
            f"the bundled lists are {', '.join(BUNDLED)}"
        )
    return parse_list(text_of(path, "list", UserError), str(path))


def parse_list(text: str, where: str) -> list[Entry]:
    """The models of a list in YAML; `where` (a file name) opens every error message.

    Raises:
        UserError: it is not a list; the message names the entry and the key.
    """
    data = mapping(text, where, "list", ("schema", "models"), UserError)
    check_schema(data, where, SCHEMA, UserError)
    models = data.get("models")
    if not isinstance(models, list) or not models:
        raise UserError(f"{where}: 'models' must list at least one model, each with a name and a model")
    entries = [_entry(one, f"{where}: model {number}") for number, one in enumerate(models, 1)]
    slugs: dict[str, str] = {}
    for entry in entries:
        other = slugs.setdefault(entry.slug.lower(), entry.name)  # some file systems do not tell cases apart
        if other is not entry.name:
            raise UserError(
                f"{where}: {shown(entry.name)} and {shown(other)} would have one folder; rename one of them"
            )
    return entries


def _entry(data: Any, where: str) -> Entry:
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a mapping with a name and a model, found {shown(data)}")
    check_keys(data, where, ("name", "model", *LOADING, "expected"), UserError)
    name, model = (_text(data, key, where) for key in ("name", "model"))
    where = f"{where} ({name})"
    loading = {key: _typed(data, key, where) for key in LOADING if data.get(key) is not None}
    expected = data.get("expected") or []
    if not isinstance(expected, list):
        raise UserError(f"{where}: 'expected' must be a list of published figures, found {shown(expected)}")
    return Entry(name, model, loading, tuple(_expected(one, f"{where}: expected") for one in expected))


def _expected(data: Any, where: str) -> Expected:
    if not isinstance(data, dict):
        raise UserError(f"{where}: must be a mapping with a figure and its source, found {shown(data)}")
    figure = _text(data, "figure", where)
    check_one_of("figure", figure, tuple(FIGURES), where, UserError)
    where, holds = f"{where} {figure}", FIGURES[figure]
    check_keys(data, where, ("figure", "source", "mode", "images", "note", *holds), UserError)
    given = {key: _typed(data, key, where) for key in data}
    if not any(key in given for key in holds):
        raise UserError(f"{where}: says nothing; give {' or '.join(holds)}")
    made = Expected(**{**given, "source": _text(data, "source", where)})
    check_one_of("mode", made.mode, tuple(MODES), where, UserError)
    if made.recipe is not None:
        check_one_of("recipe", made.recipe, tuple(bundled_recipes()), where, UserError)
    return made


def _text(data: Mapping[str, Any], key: str, where: str) -> str:
    value = data.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: '{key}' must be text, found {shown(value)}")
    return value


def _typed(data: Mapping[str, Any], key: str, where: str) -> Any:
    value, kind = data[key], TYPES.get(key, str)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where}: '{key}' has a value of the wrong kind, {shown(value)}")
    return value
