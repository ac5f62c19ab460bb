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
    """Class index of every image, by its name in the source.

    The number before `_` in the file name; otherwise the name of its folder: a number, a class of `names_of_classes`,
    or, if there are `num_classes` folders (or that number is not known), the folder's place in their order.

    Raises:
        UserError: neither gives the class, or a number is not a class of the model.
    """
    names = [name for name, _ in images.source.items(images.chosen)]
    labels = _by_file_name(names) or _by_folder(names, num_classes, names_of_classes or {})
    if labels is None:
        raise UserError(
            f"{images.note}: no labels; put the class index before _ in the file names (0013_junco.jpg), or the "
            "images of each class in a folder named by its index"
        )
    too_large = [name for name, label in labels.items() if num_classes is not None and label >= num_classes]
    if too_large:
        name = too_large[0]
        raise UserError(f"{name}: has class {labels[name]}, but there are {num_classes} classes, counted from 0")
    return labels


def _by_file_name(names: Sequence[str]) -> dict[str, int] | None:
    found = {name: NUMBERED.match(Path(name).name) for name in names}
    return None if None in found.values() else {name: int(match[1]) for name, match in found.items() if match}


def _by_folder(
    names: Sequence[str], num_classes: int | None, names_of_classes: Mapping[str, int]
) -> dict[str, int] | None:
    folder_of = {name: Path(name).parent.name for name in names}
    folders = sorted(set(folder_of.values()))
    if all(folder.isdecimal() for folder in folders):
        index = {folder: int(folder) for folder in folders}
    elif all(folder in names_of_classes for folder in folders):
        index = {folder: names_of_classes[folder] for folder in folders}
    elif len(folders) > 1 and num_classes in (None, len(folders)):
        index = {folder: place for place, folder in enumerate(folders)}
    else:
        return None
    return {name: index[folder] for name, folder in folder_of.items()}
