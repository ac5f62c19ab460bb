"""Text of others as it may be shown: nothing in it acts on a terminal or a page.

Names of folders, files, models and tensors, labels, licences and a recipe's provenance may hold anything.
"""

from __future__ import annotations

import re
from collections.abc import Collection

MARKDOWN = re.compile(r"[\\`*\[\]<|~$]|(?<!\w)_|_(?!\w)|&(?=[#\w]+;)|^(?=[#>+-])")


def plain(text: str) -> str:
    r"""`text` with what does not print (terminal escapes, bidirectional controls, bytes that are not UTF-8) escaped as
    in Python: `\x1b`. Line feeds stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def line(text: str) -> str:
    """`text` in one line, plain."""
    return plain(" ".join(text.split()))


def plural(count: int, noun: str) -> str:
    """`count` and `noun`: "1 register", "3 registers"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def in_blocks(blocks: Collection[int]) -> str:
    """Which blocks: "block 7", "blocks 6, 7"."""
    return f"block{'' if len(blocks) == 1 else 's'} {', '.join(map(str, blocks))}"


def markdown(text: str) -> str:
    """`text` in one line of Markdown that shows it as it is: no HTML, link, table cell, heading or emphasis."""
    return MARKDOWN.sub(lambda found: "&lt;" if found[0] == "<" else f"\\{found[0]}", line(text))


def code(text: str) -> str:
    """`text` in one line between the backticks of a code span, also in a table."""
    return line(text).replace("`", "'").replace("|", "¦")
