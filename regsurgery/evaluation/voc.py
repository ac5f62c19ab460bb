"""Pascal VOC's layout: `JPEGImages/NAME.jpg` with its boxes in `Annotations/NAME.xml`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from regsurgery.errors import UserError
from regsurgery.image_sources import SUFFIXES

EDGES = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class Annotated:
    """An image and its objects.

    Attributes:
        boxes: `[left, top, right, bottom]` of each object in pixels from the image's corner, float64 `[G, 4]`.
    """

    path: Path
    boxes: np.ndarray


def annotated_images(root: Path) -> list[Annotated]:
    """The images below `root` that have objects, in name order.

    Raises:
        UserError: no such folders, an image without its annotation, or a broken one.
    """
    images, annotations = root / "JPEGImages", root / "Annotations"
    for folder in (images, annotations):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: no such folder; give --images a folder in VOC layout, JPEGImages/ + Annotations/"
            )
    paths = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    found = [Annotated(path, read_boxes(annotations / f"{path.stem}.xml")) for path in paths]
    if not any(len(each.boxes) for each in found):
        raise UserError(f"{annotations}: no object in the annotations of {len(paths)} images")
    return [each for each in found if len(each.boxes)]


def read_boxes(path: Path) -> np.ndarray:
    """The boxes of an annotation file, `[G, 4]`; those marked `difficult` are among them, as in the LOST protocol.

    Only an object's own box counts: people have `part` boxes (head, hand, foot) inside theirs. VOC counts pixels from
    1 and includes the last one, so left and top are one less here.

    Raises:
        UserError: the file is absent or no such annotation.
    """
    from xml.etree import ElementTree

    try:
        objects = ElementTree.parse(path).getroot().findall("object")
        rows = [[float(each.findtext(f"bndbox/{edge}", "")) for edge in EDGES] for each in objects]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: cannot be read as a VOC annotation: {reason}") from error
    boxes_G4 = np.array(rows, dtype=np.float64).reshape(-1, 4) - (1, 1, 0, 0)
    if not (boxes_G4[:, :2] < boxes_G4[:, 2:]).all():
        raise UserError(f"{path}: an object's box is empty (xmin, ymin, xmax, ymax in pixels are expected)")
    return boxes_G4
