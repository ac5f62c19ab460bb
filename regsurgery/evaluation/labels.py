"""Class labels of images, from their names and folders."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.errors import UserError

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet

NUMBERED = re.compile(r"(\d+)_")


def labels_of(
    images: ImageSet, num_classes: int | None, names_of_classes: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Class index of every image, by its name in the source; the rule that gave it is said.

    The first of these rules that applies:

    - folders named by a class each: by numbers, or by classes of `names_of_classes`;
    - as many folders as there are classes (`num_classes`): a folder's place in their order;
    - the number before `_` in the file name;
    - if the number of classes is not known, the folder's place.

    Where the file names have numbers, one folder alone says nothing, nor do numbers that are no classes (2012).

    Raises:
        UserError: neither gives the class, or a number is not a class of the model.
    """
    names = [name for name, _ in images.source.items(images.chosen)]
    named = _by_folder_name(names, names_of_classes or {})
    placed = _by_folder_place(names, num_classes)
    numbered = _by_file_name(names)
    if numbered and named and (len(_folders(names)) == 1 or _too_large(named, num_classes)):
        named = None
    in_order = ("the folders in their order", placed)
    rules = [("the names of the folders", named), ("the number before _ in the file names", numbered)]
    rules.insert(2 if num_classes is None else 1, in_order)
    rule, labels = next(((rule, found) for rule, found in rules if found is not None), ("", None))
    if labels is None:
        raise UserError(
            f"{images.note}: no labels; put the class index before _ in the file names (0013_junco.jpg), or the "
            "images of each class in a folder named by its index"
        )
    for name in _too_large(labels, num_classes):
        raise UserError(f"{name}: has class {labels[name]}, but there are {num_classes} classes, counted from 0")
    against = "; the numbers in the file names are others" if numbered is not None and numbered != labels else ""
    images.say(f"classes: {rule}{against}")
    return labels


def _too_large(labels: Mapping[str, int], num_classes: int | None) -> list[str]:
    return [name for name, label in labels.items() if num_classes is not None and label >= num_classes]


def _by_file_name(names: Sequence[str]) -> dict[str, int] | None:
    found = {name: NUMBERED.match(Path(name).name) for name in names}
    return None if None in found.values() else {name: int(match[1]) for name, match in found.items() if match}


def _by_folder_name(names: Sequence[str], names_of_classes: Mapping[str, int]) -> dict[str, int] | None:
    folders = _folders(names)
    if all(folder.isdecimal() for folder in folders):
        index = {folder: int(folder) for folder in folders}
    elif all(folder in names_of_classes for folder in folders):
        index = {folder: names_of_classes[folder] for folder in folders}
    else:
        return None
    return {name: index[_folder(name)] for name in names}


def _by_folder_place(names: Sequence[str], num_classes: int | None) -> dict[str, int] | None:
    folders = _folders(names)
    if len(folders) == 1 or num_classes not in (None, len(folders)):
        return None
    return {name: folders.index(_folder(name)) for name in names}


def _folder(name: str) -> str:
    return Path(name).parent.name


def _folders(names: Sequence[str]) -> list[str]:
    return sorted({_folder(name) for name in names})
