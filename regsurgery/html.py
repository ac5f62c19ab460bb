"""Templates of pages in HTML, in which nothing that others wrote acts."""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING

from regsurgery.plain import line

if TYPE_CHECKING:
    from jinja2 import Template


def html_template(name: str) -> Template:
    """The template `name` of the package: values are escaped, and each must be given. Filter `line`: `plain.line`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("regsurgery"), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["line"] = line
    return environment.get_template(name)


def inline(*names: str) -> str:
    """Files of ours, one after another, for a style or script element."""
    folder = resources.files("regsurgery") / "templates"
    return "".join((folder / name).read_text("utf-8") for name in names)


def inline_json(value: object) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
