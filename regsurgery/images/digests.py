"""Digests that identify images."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.images.sources import changed

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.images.sources import Content

READ_AT_ONCE = 256  # images
SHORT = 12  # hexadecimal digits of an image's sha256 that distinguish it from the others


def image_digest(pictures: ImageSet) -> str:
    """The sha256 over the sha256 of every image file or record, in their order; independent of folder names."""
    digest = hashlib.sha256()
    for _, part in _named_digests(pictures):
        digest.update(part)
    return digest.hexdigest()


def image_digests(pictures: ImageSet) -> list[str]:
    """The first `SHORT` digits of the sha256 of every image file or record, in their order; empty for generated ones.

    Images that turned out to be unreadable are left out.
    """
    if pictures.evidence == "generated":
        return []
    return [digest.hex()[:SHORT] for name, digest in _named_digests(pictures) if name not in pictures.broken]


def _named_digests(pictures: ImageSet) -> Iterator[tuple[str, bytes]]:
    """Name and sha256 of every image file or record, in their order.

    Raises:
        UserError: an image is not there any more.
    """
    items = iter(pictures.source.items(pictures.chosen))
    with ThreadPoolExecutor() as pool:
        while some := list(itertools.islice(items, READ_AT_ONCE)):
            yield from zip((name for name, _ in some), pool.map(_digest, some), strict=True)


def _digest(item: tuple[str, Content]) -> bytes:
    name, content = item
    try:
        return _sha256(content)
    except OSError as error:
        raise changed(name, error) from error


def _sha256(content: Content) -> bytes:
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    data = content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else content.read()
    return hashlib.sha256(data).digest()
