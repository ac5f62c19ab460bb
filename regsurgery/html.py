"""Templates of pages in HTML, in which nothing that others wrote acts."""

from __future__ import annotations

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
