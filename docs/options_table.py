"""A hook of mkdocs: `<!-- options: NAME -->` in a page becomes the table of that dataclass's own fields."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from typing import Any

from regsurgery import options


def table(name: str) -> str:
    """The fields that `regsurgery.options.NAME` adds to its base and that the command line has, as Markdown."""
    own = inspect.get_annotations(kind := getattr(options, name))
    rows = ["| keyword | type | default | meaning |", "|---|---|---|---|"]
    for one in fields(kind):
        flag = one.metadata.get("flag")
        if flag is not None and one.name in own:
            kind_text = str(one.type).replace("|", "\\|")
            rows.append(f"| `{one.name}` | `{kind_text}` | `{one.default!r}` | {flag.help} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def on_page_markdown(markdown: str, **_: Any) -> str:
    return re.sub(r"<!-- options: (\w+) -->", lambda found: table(found[1]), markdown)
