"""The parts of a source's model card that the patched model's card repeats: licence, languages, data, tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CARD_NAME = "README.md"
MAX_CARD_BYTES = 1 << 20
MAX_ENTRIES, MAX_LENGTH = 100, 300  # of a list, of a text
TEXTS = ("license", "license_name", "license_link", "pipeline_tag")  # keys of a card's metadata with one text
LISTS = ("language", "datasets", "tags")  # keys with one text or a list of texts

LINK = re.compile(r"https?://\S+|[\w./-]+")  # of a licence: a page, or a file of the repository


@dataclass(frozen=True)
class SourceCard:
    """The repeated part of a source card's metadata.

    Attributes:
        problem: why the card could not be read, if there is one; then nothing is repeated.
    """

    texts: dict[str, str]
    lists: dict[str, list[str]]
    problem: str | None = None

    @property
    def license(self) -> str | None:
        return self.texts.get("license")


def read_source_card(folder: Path) -> SourceCard:
    """The metadata of `README.md` in a source's folder. What is not plain text of usual length is left out."""
    import yaml
    from huggingface_hub import metadata_load

    path = folder / CARD_NAME
    if not path.is_file():
        return SourceCard({}, {})
    if path.stat().st_size > MAX_CARD_BYTES:
        return SourceCard({}, {}, f"it has more than {MAX_CARD_BYTES} bytes")
    try:
        metadata: Any = metadata_load(path)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # text that is not UTF-8 is a ValueError too
        return SourceCard({}, {}, f"its metadata is broken ({type(error).__name__})")
    metadata = metadata if isinstance(metadata, dict) else {}
    texts = {key: metadata[key] for key in TEXTS if _is_text(metadata.get(key))}
    if not LINK.fullmatch(texts.get("license_link", "")):
        texts.pop("license_link", None)
    lists = {}
    for key in LISTS:
        value = metadata.get(key)
        entries = value if isinstance(value, list) else [value]
        if found := [entry for entry in entries[:MAX_ENTRIES] if _is_text(entry)]:
            lists[key] = found
    return SourceCard(texts, lists)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_LENGTH and value.isprintable()
