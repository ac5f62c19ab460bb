"""What a command tells about itself while it runs."""

from __future__ import annotations


class Progress:
    """What the pipeline tells about itself while it runs; the command line draws it. This one is silent."""

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        """A new stage begins; `total` images where it goes over images, or bytes."""

    def advance(self, number: int) -> None:
        """That many images or bytes are done."""

    def say(self, line: str) -> None:
        """A fact worth a line."""
