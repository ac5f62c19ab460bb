"""The consoles of the command line: rich's, with nothing in a text that acts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.segment import Segment

from regsurgery.plain import plain


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on which texts of others (names, labels, ids) are shown as they are, whatever they contain."""
    made = Console(stderr=stderr, quiet=quiet, highlight=False, markup=False, emoji=False)
    made.push_render_hook(_Plain())
    return made


class _Plain(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Shown(one) for one in renderables]


class _Shown:
    """A renderable whose text is plain; what rich itself sends to the terminal stays."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._segments(console, options)

    def _segments(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for text, style, control in console.render(self.inner, options):
            yield Segment(text if control else plain(text), style, control)
