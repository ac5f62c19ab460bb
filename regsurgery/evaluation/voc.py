"""The layout of Pascal VOC: `JPEGImages/NAME.jpg` with its boxes in `Annotations/NAME.xml`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from regsurgery.errors import UserError, in_short

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet

MAX_ANNOTATION_BYTES = 1 << 20
EDGES = ("xmin", "ymin", "xmax", "ymax")


def objects_of(images: ImageSet) -> dict[str, np.ndarray]:
    """The boxes of the objects in each image, by the image's name, `[G, 4]`; some may have none, but not all.

    Raises:
        UserError: an annotation is missing or broken, or no image has objects.
    """
    objects = {name: boxes_of_image(Path(name)) for name, _ in images.source.items(images.chosen)}
    if not any(map(len, objects.values())):
        raise UserError(f"{images.note}: their annotations have no objects to discover; give images with objects")
    return objects


def boxes_of_image(path: Path) -> np.ndarray:
    """The boxes of the objects in `DIR/JPEGImages/NAME.jpg`, read from `DIR/Annotations/NAME.xml`, `[G, 4]`.

    Raises:
        UserError: the annotation is missing or broken.
    """
    annotation = path.parent.parent / "Annotations" / f"{path.stem}.xml"
    if not annotation.is_file():
        raise UserError(
            f"{annotation}: no such annotation of {path.name}; give --images a folder in VOC layout, with JPEGImages/ "
            "and Annotations/"
        )
    return read_boxes(annotation)


def read_boxes(path: Path) -> np.ndarray:
    """The boxes of an annotation file, `[G, 4]`, including those marked `difficult`, as in the LOST protocol.

    Only an object's own box counts: people have `part` boxes (head, hand, foot) inside theirs. VOC counts pixels from
    1 and includes the last one, so left and top are one less here.

    Raises:
        UserError: the file is missing or not a VOC annotation.
    """
    from xml.etree import ElementTree  # nosec B405 # entities are refused below

    try:
        text = path.read_bytes()[: MAX_ANNOTATION_BYTES + 1]
        if len(text) > MAX_ANNOTATION_BYTES or b"<!" in text.replace(b"<!--", b""):
            raise ValueError("it declares types or entities, or is larger than an annotation")  # entities can nest
        objects = ElementTree.fromstring(text).findall("object")  # nosec B314 # as above
        rows = [[float(each.findtext(f"bndbox/{edge}", "")) for edge in EDGES] for each in objects]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        reason = in_short(error)
        raise UserError(f"{path}: cannot be read as a VOC annotation: {reason}") from error
    boxes_G4 = np.array(rows, dtype=np.float64).reshape(-1, 4) - (1, 1, 0, 0)
    if not (boxes_G4[:, :2] < boxes_G4[:, 2:]).all():
        raise UserError(f"{path}: an object's box is empty (xmin, ymin, xmax, ymax in pixels are expected)")
    return boxes_G4
