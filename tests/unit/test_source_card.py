"""What is taken from a source's model card, and what is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from regsurgery.emit.source_card import MAX_CARD_BYTES, read_source_card


def card(folder: Path, text: str) -> Path:
    (folder / "README.md").write_text(text, "utf-8")
    return folder


def test_licence_and_lists_are_taken(tmp_path: Path) -> None:
    found = read_source_card(card(tmp_path, "---\nlicense: mit\nlanguage: [en, de]\ntags: vision\n---\nText"))
    assert (found.license, found.lists, found.problem) == ("mit", {"language": ["en", "de"], "tags": ["vision"]}, None)


def test_other_keys_and_other_types_are_left(tmp_path: Path) -> None:
    text = f"---\nlicense: [a]\nlicense_name: 'a\\u0007'\nbase_model: x\ntags: [1, {{a: b}}, {'x' * 301}, ok]\n---\n"
    found = read_source_card(card(tmp_path, text.replace("'a\\u0007'", '"a\\u0007"')))
    assert (found.texts, found.lists, found.problem) == ({}, {"tags": ["ok"]}, None)


@pytest.mark.parametrize("text", ["", "No front matter", "---\nnothing\n"])
def test_a_card_without_metadata_says_nothing(text: str, tmp_path: Path) -> None:
    found = read_source_card(card(tmp_path, text))
    assert (found.texts, found.lists, found.problem) == ({}, {}, None)


def test_no_card_says_nothing(tmp_path: Path) -> None:
    assert read_source_card(tmp_path).texts == {}


@pytest.mark.parametrize("text", ["---\na: [\n---\n", "---\n- a list\n---\n", "---\na: !!python/name:os.system\n---\n"])
def test_broken_metadata_are_told_of(text: str, tmp_path: Path) -> None:
    found = read_source_card(card(tmp_path, text))
    assert found.texts == {} and "broken" in str(found.problem)


def test_what_is_no_text_or_too_much_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert "broken" in str(read_source_card(tmp_path).problem)
    assert "more than" in str(read_source_card(card(tmp_path, "x" * (MAX_CARD_BYTES + 1))).problem)
