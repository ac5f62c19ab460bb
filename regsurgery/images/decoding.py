"""An item of a source -> its picture."""

from __future__ import annotations

import contextlib
import functools
import io
import random
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import PIL
import PIL.ExifTags
import PIL.Image
import PIL.ImageOps

from regsurgery.errors import in_short
from regsurgery.images.generated import NOISE, dead_leaves, noise_texture
from regsurgery.images.sources import Content, Stretch

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_ELONGATED = 50
USUAL_RANGES = (1, 255, 65535)  # from 0; the first of floats alone
MIN_SPAN = 1e-12
# What Pillow's decoders raise on damaged files besides `UNREADABLE`.
DAMAGED = (RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError, EOFError, AssertionError,
           struct.error, zlib.error)  # fmt: skip


@functools.lru_cache(maxsize=64)  # 13 MB; a command looks at the same few pictures several times
def _generated(seed: str) -> Image:
    return (noise_texture if seed.startswith(NOISE) else dead_leaves)(random.Random(seed))


def decode(content: Content) -> Image:
    """The picture of an item, RGB, upright by its EXIF orientation.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image, or one that no model was made for.
    """
    if isinstance(content, str):
        return _generated(content).copy()
    with opened(content) as image:
        long, short = max(image.size), min(image.size)
        if long > MOST_ELONGATED * short:  # resized by its shorter side it would take a multiple of the memory
            raise ValueError(f"{image.width}x{image.height} pixels: one side is over {MOST_ELONGATED} times the other")
        upright = PIL.ImageOps.exif_transpose(image)
        return (_eight_bit(upright) if upright.mode.startswith(("I", "F")) else upright).convert("RGB")


def orientation(content: Content) -> int:
    """The EXIF orientation of an item, 1 (upright) to 8; of pictures without one 1.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image.
    """
    if isinstance(content, str):
        return 1
    with opened(content) as image:
        return image.getexif().get(PIL.ExifTags.Base.Orientation, 1)


@contextlib.contextmanager
def opened(content: Path | Stretch | bytes) -> Iterator[Image]:
    """The picture of an item as Pillow opens it, as long as it is used.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image; also while it is used.
    """
    if isinstance(content, Stretch):
        content = content.read()
    if isinstance(content, Path) and content.exists() and not content.is_file():  # reading a pipe would not end
        raise ValueError("not a regular file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata in files that can be read
        try:
            with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                yield image
        except PIL.UnidentifiedImageError as error:
            raise ValueError("not an image format that Pillow knows" if content != b"" else "empty") from error
        except PIL.Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
        except DAMAGED as error:
            raise ValueError(f"damaged ({in_short(error, 100)})") from error


def _eight_bit(image: Image) -> Image:
    """Grey values of 16 or 32 bits, or floats, as 8 bits: `convert` would clip them, leaving black or white.

    They are taken for parts of the smallest of the usual ranges that holds them, and where none does, of their own.
    """
    import numpy as np

    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("has grey values that are not finite")
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        ranges = [65535]
    else:
        ranges = [top for top in USUAL_RANGES if low >= 0 and high <= top and (top > 1 or image.mode == "F")]
    bottom, top = (0, ranges[0]) if ranges else (low, high)
    scaled = (values - bottom) * (256 / (top + 1) if top in (255, 65535) else 255 / max(top - bottom, MIN_SPAN))
    return PIL.Image.fromarray(scaled.clip(0, 255).astype(np.uint8))
