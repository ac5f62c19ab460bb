"""Images in: chosen from a source, decoded and preprocessed in worker processes, handed out in batches."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle  # nosec B403 # see `_unpacked`
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from regsurgery.errors import UserError, in_short
from regsurgery.images.decoding import decode
from regsurgery.images.generated import Generated
from regsurgery.images.opening import open_source
from regsurgery.images.sources import UNREADABLE, ImageSource, Item, Stretch

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

DEFAULT_GENERATED = 32
MAX_GENERATED = 1_000_000  # their numbers alone take memory
MIN_IMAGES = 4  # readable ones in what the user gave
IN_PROCESS = 32  # up to this many images, worker processes are not worth starting
MAX_WORKERS = 8


@dataclass(frozen=True)
class ImageSet:
    """Images of one source, decoded when asked for.

    Attributes:
        note: one line that says what they are.
        source, chosen: the images are the numbers `chosen` of `source`, ascending.
        say: is told about every broken image, once.
        broken: name -> reason, for the images that could not be read so far.
    """

    note: str
    source: ImageSource
    chosen: range | tuple[int, ...]
    say: Callable[[str], None] = lambda line: None
    broken: dict[str, str] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return len(self.chosen)

    @property
    def evidence(self) -> Literal["photos", "generated"]:
        """The kind of images, which is the evidence for figures measured on them."""
        return "generated" if isinstance(self.source, Generated) else "photos"

    def some(self, count: int) -> ImageSet:
        """At most `count` of these images: evenly spread, or the first ones if the source can only be streamed."""
        if count >= len(self.chosen):
            return self
        if self.source.random_access:
            return replace(self, chosen=tuple(self.chosen[i * len(self.chosen) // count] for i in range(count)))
        return replace(self, chosen=self.chosen[:count])

    def hold_out(self, count: int) -> tuple[ImageSet, ImageSet]:
        """All images except `count` evenly spread ones, and those `count`."""
        total = len(self.chosen)
        places = {(2 * i + 1) * total // (2 * count) for i in range(count)}
        rest = tuple(number for place, number in enumerate(self.chosen) if place not in places)
        return replace(self, chosen=rest), replace(self, chosen=tuple(self.chosen[place] for place in sorted(places)))

    def batches(self, size: int, preprocess: Callable[[list[Image]], Tensor]) -> Iterator[Tensor]:
        """All images, `size` at a time; see `numbered_batches`."""
        for _, batch in self.numbered_batches(size, preprocess):
            yield batch

    def numbered_batches(
        self,
        size: int,
        preprocess: Callable[[list[Image]], Tensor],
        *,
        first: int = 0,
        step: int = 1,
        by_file: bool = False,
        least: int = MIN_IMAGES,
        broken: dict[str, str] | None = None,
    ) -> Iterator[tuple[int, Tensor]]:
        """The batches numbered `first`, `first + step`, ... as tensors `[B, 3, H, W]`, with their numbers.

        A broken image is left out of its batch, reported and remembered; the other batches do not change. A batch
        without readable images is left out.

        Args:
            by_file: a batch ends where a tar ends.
            least: how many of the images must be readable.
            broken: receives name -> reason for the broken images of these batches.

        Raises:
            UserError: a dataset file is broken; or, at the end, fewer than `least` of the images could be read.
        """
        broken_here = {} if broken is None else broken
        for number, (pixels, unreadable) in zip(
            itertools.count(first, step), self._decoded(size, preprocess, first, step, by_file), strict=False
        ):
            for name, reason in unreadable.items():
                broken_here[name] = reason
                if name not in self.broken:
                    self.broken[name] = reason
                    self.say(f"skipped {name}: {reason}")
            if len(pixels):
                yield number, pixels
            _trim_heap()
        readable = len(self.chosen) - len(broken_here)
        if broken_here and readable < least:
            examples = "; ".join(f"{name}: not a readable image ({reason})" for name, reason in broken_here.items())
            count = f"{readable} of {len(self.chosen)} images can be read"
            raise UserError(f"{count}, at least {least} are needed: {examples[:500]}")

    def _decoded(
        self, size: int, preprocess: Callable[[list[Image]], Tensor], first: int, step: int, by_file: bool
    ) -> Iterator[tuple[Tensor, dict[str, str]]]:
        """For each batch its images `[B, 3, H, W]`, and name -> reason for images that cannot be read."""
        import torch
        from torch.utils.data import DataLoader

        read = _Reader(preprocess)
        batches = itertools.islice(_grouped(self.source.items(self.chosen), size, by_file), first, None, step)
        if len(self.chosen) <= IN_PROCESS or sys.platform != "linux":  # elsewhere a fork is not safe
            for batch in batches:
                yield _stacked([read[item] for item in batch])
            return
        # The items themselves are the "indices" that the loader sends to its workers, a bounded number ahead. Results
        # are pickled: tensors would pass through /dev/shm, and hang if that is small (64 MB in Docker).
        loader = DataLoader(
            read,  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=min(MAX_WORKERS, max(1, len(os.sched_getaffinity(0)) - 1)),
            collate_fn=_packed,
            multiprocessing_context="fork",
            worker_init_fn=_end_with_parent,
            generator=torch.Generator(),  # the global one stays untouched
        )
        yield from map(_unpacked, loader)


def _end_with_parent(worker: int) -> None:
    """A worker whose parent is killed while it writes into a full pipe would otherwise wait forever."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of Linux
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


class _Reader:
    """Item -> its pixels `[3, H, W]`, or its name and why it cannot be read. Runs in the workers."""

    def __init__(self, preprocess: Callable[[list[Image]], Tensor]) -> None:
        self.preprocess = preprocess

    def __getitem__(self, item: Item) -> Tensor | tuple[str, str]:
        name, content = item
        try:
            image = decode(content)
        except UNREADABLE as error:
            return name, in_short(error)
        return self.preprocess([image])[0]


def _stacked(read: list[Tensor | tuple[str, str]]) -> tuple[Tensor, dict[str, str]]:
    import torch

    pixels = [entry for entry in read if not isinstance(entry, tuple)]
    broken = dict(entry for entry in read if isinstance(entry, tuple))
    return torch.stack(pixels) if pixels else torch.empty(0), broken


def _packed(read: list[Tensor | tuple[str, str]]) -> bytes:
    """A batch as bytes; the pixels as one block, which the other side uses without a copy."""
    import torch

    pixels, broken = _stacked(read)
    block = bytearray(pixels.contiguous().view(torch.uint8).numpy().tobytes())
    return pickle.dumps((tuple(pixels.shape), pixels.dtype, block, broken))


def _unpacked(packed: bytes) -> tuple[Tensor, dict[str, str]]:
    import torch

    shape, dtype, block, broken = pickle.loads(packed)  # nosec B301 # from our own worker
    return torch.frombuffer(block, dtype=dtype).reshape(shape) if block else torch.empty(0), broken


def _trim_heap() -> None:
    """Return freed memory to the system. When batches arrive while large activations come and go, glibc's heap
    fragments: without this, a process with a ViT-B grows by 100 MB per thousand images although nothing is kept.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _grouped(items: Iterator[Item], size: int, by_file: bool) -> Iterator[list[Item]]:
    for run in (run for _, run in itertools.groupby(items, _tar)) if by_file else (items,):
        while batch := list(itertools.islice(run, size)):
            yield batch


def _tar(item: Item) -> Path | None:
    content = item[1]
    return content.path if isinstance(content, Stretch) else None


def another_kind(count: int, *, seed: int = 0) -> ImageSet:
    """`count` generated pictures of another kind than those of `image_set`."""
    return ImageSet(f"{count} generated noise pictures", Generated(count, seed, noise=True), range(count))


def image_set(
    where: str | os.PathLike[str] | None,
    num_images: int | None = None,
    *,
    seed: int = 0,
    purpose: str = "",
    say: Callable[[str], None] = lambda line: None,
) -> ImageSet:
    """The images in `where`, or dead-leaves pictures if it is None.

    Args:
        where: a folder of image files (recursively, in name order), of parquet or arrow files or of WebDataset tars, or
            one such file.
        num_images: maximum number, see `ImageSet.some`; default: all, or `DEFAULT_GENERATED`.
        seed: for the dead-leaves pictures.
        purpose: one word for what those are used for; another purpose gives other pictures.
        say: is told about every broken image, once.

    Raises:
        UserError: nothing is there, it has no image or fewer than `MIN_IMAGES`, or a dataset file is broken; or more
            than `MAX_GENERATED` pictures are to be generated.
    """
    if num_images is not None and num_images < 1:
        raise UserError(f"{num_images} images were asked for; ask for at least one")
    if where is None:
        count = num_images or DEFAULT_GENERATED
        if count > MAX_GENERATED:
            raise UserError(f"--num-images {count}: at most {MAX_GENERATED} pictures are generated; ask for fewer")
        note = f"{count} generated dead-leaves pictures (no --images given)"
        return ImageSet(note, Generated(count, seed, purpose), range(count))
    root = Path(where)
    source = open_source(root)
    if len(source) < MIN_IMAGES:
        images = "image" if len(source) == 1 else "images"
        count = f"{len(source)} {images} in it, at least {MIN_IMAGES} are needed"
        raise UserError(f"{root}: {count}; give more, or leave out --images to use generated ones")
    images = ImageSet("", source, range(len(source)), say).some(num_images or len(source))
    return replace(images, note=f"{images.num_images} images of {Path(os.path.abspath(root)).name}")
