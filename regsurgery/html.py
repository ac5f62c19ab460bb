"""Templates of pages in HTML, in which nothing that others wrote acts."""

from __future__ import annotations

import base64
import hashlib
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


def script_hashes(*scripts: str) -> str:
    """The sources of a Content-Security-Policy that let these scripts of a page run, and no other that is in it.

    Raises:
        ValueError: a browser would read a script otherwise than it is written.
    """
    if any("\r" in script or "\0" in script for script in scripts):
        raise ValueError("a script has characters that HTML changes")
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode('ascii')}'" for digest in digests)


def inline_json(value: object) -> str:
    """JSON that is safe inside a script element."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
