"""Original and patched model side by side, and the images that both see."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from regsurgery.backends.formats import backend
from regsurgery.compiler.located import Located, OfLocated
from regsurgery.compiler.modes.native import restored_native
from regsurgery.compiler.outliers import robust_outliers, token_norms
from regsurgery.compiler.sites import Sites
from regsurgery.compiler.surgery import Surgery, perform
from regsurgery.compiler.trace import trace
from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.formats import LIBRARIES, PROGRAM_CONFIG, PROGRAMS
from regsurgery.frontends.image_size import at_image_size
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.loaded import Loaded
from regsurgery.images.image_set import ImageSet
from regsurgery.models import locate, open_model
from regsurgery.modes import MODES, NATIVE
from regsurgery.options import LoadOptions
from regsurgery.progress import Progress
from regsurgery.recipe import Recipe
from regsurgery.verification.observing import Observation, Observer, Subject
from regsurgery.verification.original_of import original_of
from regsurgery.verification.patched import (
    PatchedFolder,
    existing_folder,
    open_patched,
    size_of_program,
    take_our_tensors,
)
from regsurgery.verification.side import Side, original_side, sides
from regsurgery.verification.stock import host_outputs, load_stock, stock_side

if TYPE_CHECKING:
    from PIL.Image import Image

    from regsurgery.progress import Progress

BATCH = 8


@dataclass(frozen=True)
class Batch:
    """Images that both models see.

    Attributes:
        pixels: preprocessed, `[B, 3, H, W]`.
        names: one per image; for image files their paths.
    """

    pixels: Tensor
    names: tuple[str, ...]


class OutlierCount:
    """Outlier patches of the original after its last block but one, over all images that were observed."""

    def __init__(self) -> None:
        self.num_outliers, self.num_images = 0, 0

    def add(self, patches_BND: Tensor) -> None:
        self.num_outliers += int(robust_outliers(token_norms(patches_BND)).sum())
        self.num_images += len(patches_BND)

    @property
    def per_image(self) -> float | None:
        """Outliers per image; None before any image was seen."""
        return self.num_outliers / self.num_images if self.num_images else None


@dataclass(frozen=True)
class Pair(OfLocated):
    """The original and the patched model of one folder, as graphs.

    Attributes:
        folder: the patched folder as the user gave it, or an unpatched MODEL; then `patched` is `original`.
        original, patched: the two subjects; see `observer`.
        located: the original; both use its `preprocess`.
        recipe: None for an unpatched model.
        surgery: the repeated surgery that `patched` comes from; None for an unpatched model, and for stock checkpoints
            of native mode, which are traced and matched themselves.
        stock: the loaded stock checkpoint of native mode.
        outliers: counts over every image that an observer of this pair sees.
    """

    folder: str
    format: str
    mode: str
    original: Subject
    patched: Subject
    located: Located
    recipe: Recipe | None = None
    surgery: Surgery | None = None
    stock: Loaded | None = None
    outliers: OutlierCount = field(default_factory=OutlierCount)

    @property
    def is_same(self) -> bool:
        """Whether there is only one model."""
        return self.patched is self.original

    def batches(self, images: ImageSet, size: int = BATCH) -> Iterator[Batch]:
        """All images, preprocessed for the model; names are read in the order of the source."""
        items = images.source.items(images.chosen)
        groups = iter(lambda: [name for name, _ in itertools.islice(items, size)], [])
        seen = -1
        for number, pixels in images.numbered_batches(size, self.loaded.preprocess):
            names = next(itertools.islice(groups, number - seen - 1, None))
            seen = number
            yield Batch(pixels, tuple(name for name in names if name not in images.broken))

    def observer(self, *, blocks: Sequence[int] = (), what: Sequence[str] = (), outputs: bool = False) -> PairObserver:
        """An observer of both models; see `observing.Observer`. Its images are counted in `outliers`."""
        return PairObserver(self, blocks, what, outputs)

    def at_size(self, size: tuple[int, int]) -> Pair:
        """The same pair for images of another size (height, width), traced again: 2 s for a ViT-Ti.

        Raises:
            UnsupportedModelError: the model takes only one size.
        """
        if size == self.traced.image_size:
            return self
        located = locate(frontend(self.loaded.library).at_size(self.loaded, size), Progress(), size)
        original, sites = _original(located), located.sites
        resized = replace(self, original=original, patched=original, located=located, surgery=None)
        if self.recipe is None:
            return resized
        if self.stock is not None:
            stock = frontend(self.stock.library).at_size(self.stock, size)
            side = stock_side(
                stock, trace(stock, size), sites, self.recipe, self.recipe.num_registers, Path(self.folder)
            )
            return replace(resized, stock=stock, patched=_patched(side, self.mode, size, sites))
        assert self.surgery is not None
        if self.recipe.kind.stock:
            surgery = restored_native(located, self.recipe, self.surgery.edit)
        else:
            surgery = perform(located, self.recipe)
            if surgery.plan.num_added:
                take_our_tensors(surgery, Path(self.folder), self.format)
        return replace(resized, surgery=surgery, patched=_patched(sides(surgery)[1], self.mode, size, sites))


class PairObserver:
    """Observes both models of a pair, with one forward of each per batch."""

    def __init__(self, pair: Pair, blocks: Sequence[int], what: Sequence[str], outputs: bool) -> None:
        self.pair = pair
        probe = pair.sites.probe_block
        # Always observed: a difference is to be expected only if there are outliers there.
        self.original = Observer(pair.original, blocks=blocks, what=what, outputs=outputs, streams=(probe,))
        self.patched = (
            self.original if pair.is_same else Observer(pair.patched, blocks=blocks, what=what, outputs=outputs)
        )

    def __call__(self, images: Tensor) -> tuple[Observation, Observation]:
        """Original and patched on images `[B, 3, H, W]`."""
        original = self.original(images)
        self.pair.outliers.add(original.patches(self.pair.sites.probe_block))
        return original, original if self.pair.is_same else self.patched(images)


@contextmanager
def open_pair(folder: str | Path, original: str | None = None, options: LoadOptions | None = None) -> Iterator[Pair]:
    """Both models of a folder that regsurgery wrote, in any mode and format; or only a MODEL that is not patched.

    The folder's files are checked against its SHA256SUMS. The original is restored from the folder if it has all of
    the original's tensors; otherwise it is loaded from `original` or from its recorded source, as in `verify`.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
        UnsupportedModelError: the model has no sites.
    """
    options = options or LoadOptions()
    progress = options.progress
    if not _is_patched(folder):
        if original is not None:
            raise UserError(f"{folder}: is not patched, so it has no original; leave out --original")
        located = open_model(str(folder), options)
        subject = _original(located)
        yield Pair(str(folder), located.loaded.library, "original", subject, subject, located)
        return
    root = existing_folder(folder)
    progress.stage("checksums")
    with reopened(open_patched(root), str(folder), original, options) as pair:
        yield pair


@contextmanager
def reopened(
    opened: PatchedFolder, name: str, original: str | None, options: LoadOptions, image_size: int | None = None
) -> Iterator[Pair]:
    """Both models of a patched folder: the only way to open a folder again.

    Args:
        name: the folder's name.
        original: MODEL that was patched, if the folder cannot restore it.
        image_size: side in pixels; by default the size of the model or program.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
        UserError: the model or program does not take such images.
    """
    fmt, recipe, root, progress = opened.format, opened.recipe, opened.root, options.progress
    options = replace(options, tower=opened.config["regsurgery"].get("tower"))
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        progress.stage("load")
        loaded = original_of(opened, original, options, Path(scratch))
        side = size_of_program(opened, image_size) if fmt in PROGRAMS else image_size
        located = locate(at_image_size(loaded, side), progress)
        surgery = stock = None
        if recipe.kind.stock and fmt in LIBRARIES:
            stock, patched = _stock(opened, located, options, Path(scratch) / "stock")
        else:
            if recipe.kind.stock:
                surgery = restored_native(located, recipe, backend(fmt).state(root))
            else:
                progress.stage("surgery")
                surgery = perform(located, recipe)
                take_our_tensors(surgery, root, fmt)
            patched = _patched(sides(surgery)[1], recipe.mode, located.traced.image_size, located.sites)
        yield Pair(name, fmt, recipe.mode, _original(located), patched, located, recipe, surgery, stock)


def _is_patched(folder: str | Path) -> bool:
    root = Path(folder)
    if not root.is_dir():
        return False
    if (root / PROGRAM_CONFIG).is_file():
        return True
    from regsurgery.frontends.config import read_config

    return "regsurgery" in read_config(root)[2]


def _original(located: Located) -> Subject:
    return Subject(original_side(located), "original", located.traced.image_size, located.sites.patches, slice(0, 0))


def _patched(side: Side, mode: str, size: tuple[int, int], sites: Sites) -> Subject:
    attended = sites.patched(1) if MODES[mode].constants else (side.patches, side.registers)
    return Subject(side, mode, size, *attended)


def _stock(opened: PatchedFolder, located: Located, options: LoadOptions, place: Path) -> tuple[Loaded, Subject]:
    """The stock checkpoint of native mode, loaded, and as a subject with outputs by the original's names."""
    loaded, sites, size, fmt = located.loaded, located.sites, located.traced.image_size, opened.format
    block = opened.config["regsurgery"]
    place.mkdir()
    allowed = replace(options, max_memory=0 if loaded.stored else None, tower=None)
    stock = load_stock(opened.root, fmt, opened.config, allowed, place)
    if loaded.own is not None:
        stock = frontend(stock.library).at_size(stock, size)
    stock_traced = trace(stock, size)
    side = stock_side(stock, stock_traced, sites, opened.recipe, block["num_registers"], opened.root)
    library = loaded.library
    heads = {name for name, kind in block["outputs"].items() if kind == "head" and fmt == library}
    shared = heads & set(stock_traced.output_names)
    host = backend(fmt, NATIVE)

    def outputs_of(outputs: Any, images: Tensor) -> Any:
        if shared == set(block["outputs"]):
            return {name: outputs[name] for name in shared}
        images = images.to(next(stock.model.parameters()).device)
        return host_outputs(host, stock.model, images, block)

    return stock, replace(_patched(side, opened.recipe.mode, size, sites), outputs_of=outputs_of)


def normalisation(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """(mean, scale) `[3, 1, 1]`: the model's preprocessing maps pixels in [0, 1] to (pixel - mean) * scale.

    Measured on a black and a white picture, so it does not depend on how a library writes them down.

    Raises:
        UnsupportedModelError: the preprocessing does more than normalise.
    """
    import PIL.Image

    height, width = loaded.image_size
    pictures = [PIL.Image.new("RGB", (width, height), (value,) * 3) for value in (0, 255, 51)]
    black_3, white_3, grey_3 = (loaded.preprocess([picture])[0].float().mean(dim=(1, 2)) for picture in pictures)
    scale_3 = white_3 - black_3
    if not torch.allclose(grey_3, black_3 + 0.2 * scale_3, atol=2e-2) or not bool((scale_3 > 0).all()):
        raise UnsupportedModelError(f"{loaded.source.id}: its preprocessing is not a plain normalisation of pixels")
    return (-black_3 / scale_3)[:, None, None], scale_3[:, None, None]


def pixels_of(image: Image) -> Tensor:
    """An RGB picture as `[3, height, width]` in [0, 1], float32."""
    from torchvision.transforms.v2 import functional

    return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
