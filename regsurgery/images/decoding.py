"""An item of a source -> its picture."""

from __future__ import annotations

import functools
import io
import random
import warnings
from typing import TYPE_CHECKING

from regsurgery.images.generated import NOISE, dead_leaves, noise_texture
from regsurgery.images.sources import Content, Stretch

if TYPE_CHECKING:
    from PIL.Image import Image


@functools.lru_cache(maxsize=64)  # 13 MB; a command looks at the same few pictures several times
def _generated(seed: str) -> Image:
    return (noise_texture if seed.startswith(NOISE) else dead_leaves)(random.Random(seed))


def decode(content: Content) -> Image:
    """The picture of an item, RGB.

    Raises:
        OSError, SyntaxError, ValueError: not a readable image.
    """
    import PIL.Image

    if isinstance(content, str):
        return _generated(content).copy()
    if isinstance(content, Stretch):
        content = content.read()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about damaged metadata in files that can be read
        try:
            with PIL.Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
                if image.mode.startswith("I;16"):  # `convert` would clip to 255, leaving them white
                    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
                return image.convert("RGB")
        except PIL.UnidentifiedImageError as error:
            raise ValueError("not an image format that Pillow knows" if content != b"" else "empty") from error
        except PIL.Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
