"""YAML that people write, read strictly: nothing in it is lost, repeated or run, and every error is one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from regsurgery.errors import UserError, did_you_mean

MAX_BYTES = 1 << 16  # a second of parsing
MAX_DEPTH = 64


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML silently keeps the last) and aliases, which can nest a
    few lines into billions of values.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(
                None, None, "aliases (*name) are not supported; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        if self.flow_level >= MAX_DEPTH:  # the scanner's time grows with its square
            raise yaml.MarkedYAMLError(None, None, f"more than {MAX_DEPTH} nested brackets", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            try:
                twice = key in seen
            except TypeError as error:
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                ) from error
            if twice:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shown(key)} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


# ValueError, TypeError, KeyError and AttributeError come from the constructors of numbers, dates and sets.
NOT_YAML = (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError, OverflowError)


def text_of(path: Path, what: str, error: type[UserError]) -> str:
    """The text of a file, or of an endless one more than `mapping` takes.

    Args:
        what: the file should be, in messages: a recipe, a list of models.

    Raises:
        UserError: as `error`: it cannot be read, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES * 4 + 1).decode("utf-8")
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror or problem}); give a {what} file") from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not a UTF-8 text file; give a {what} file") from problem


def mapping(text: str, where: str, what: str, keys: Sequence[str], error: type[UserError]) -> dict[Any, Any]:
    """The mapping in a YAML text, which has some of the `keys`; `where` (a file name) opens every message.

    Raises:
        UserError: as `error`: it is too long, or not YAML, or not a mapping, or has another key.
    """
    if len(text) > MAX_BYTES:
        raise error(f"{where}: has {len(text)} characters, a {what} may have at most {MAX_BYTES}; shorten it")
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # nosec B506 # a SafeLoader
    except NOT_YAML as problem:
        told = str(problem).replace('in "<unicode string>", ', "at ")  # PyYAML's name for a text
        raise error(f"{where}: not valid YAML: {' '.join(told.split())[:400]}; correct it") from problem
    if not isinstance(data, dict):
        raise error(f"{where}: expected a mapping with the keys {', '.join(keys)}")
    check_keys(data, where, keys, error)
    return data


def check_keys(data: Mapping[Any, Any], where: str, keys: Sequence[str], error: type[UserError]) -> None:
    """Raise `error` for a key that is not one of `keys`."""
    for key in data:
        if key not in keys:
            raise error(f"{where}: unknown key {shown(str(key))}{did_you_mean(shown(key, ''), list(keys))}")


def check_schema(data: Mapping[Any, Any], where: str, known: int, error: type[UserError]) -> None:
    """Raise `error` unless the key `schema` is `known`."""
    if "schema" not in data:
        raise error(f"{where}: the key 'schema' is missing; this version writes schema: {known}")
    given = data["schema"]
    if type(given) is not int or given != known:
        raise error(
            f"{where}: schema {shown(given, '')} is not known to this version of regsurgery (it reads schema {known})"
        )


def check_one_of(key: str, value: Any, known: Sequence[str], where: str, error: type[UserError]) -> None:
    """Raise `error` unless the `value` of a key is one of `known`."""
    if value not in known:
        near = did_you_mean(shown(value, ""), list(known))
        raise error(f"{where}: {key} must be one of {', '.join(known)}, found {shown(value)}{near}")


def shown(value: Any, quote: str | None = None) -> str:
    """`value` in an error message: as Python writes it, or between `quote`s; cut if long."""
    try:
        text = repr(value) if quote is None or not str(value).isprintable() else f"{quote}{value}{quote}"
    except ValueError:  # a whole number with thousands of digits
        return "a number with thousands of digits"
    return text if len(text) <= 100 else f"{text[:100]}..."
