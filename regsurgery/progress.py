"""What a command reports while it runs."""

from __future__ import annotations


class Progress:
    """What the pipeline reports while it runs; the command line draws it. This one is silent."""

    def stage(self, name: str, total: int | None = None, *, in_bytes: bool = False) -> None:
        """A new stage begins; `total` is its number of images, or of bytes."""

    def advance(self, number: int) -> None:
        """`number` more images or bytes are done."""

    def say(self, line: str) -> None:
        """A fact worth a line."""
