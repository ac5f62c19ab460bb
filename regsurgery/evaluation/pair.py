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

from regsurgery import backends, pipeline
from regsurgery.calibration import ImageSet
from regsurgery.errors import UnsupportedModelError, UserError
from regsurgery.fitting import restored_native
from regsurgery.loading import Loaded, LoadOptions
from regsurgery.observing import Observation, Observer, Subject
from regsurgery.patched import existing_folder, open_patched, take_our_tensors
from regsurgery.recipe import Recipe
from regsurgery.sites import Sites
from regsurgery.statistics import robust_outliers, token_norms
from regsurgery.surgery import Surgery, perform
from regsurgery.trace import Traced, trace
from regsurgery.verification import Side, sides
from regsurgery.written import host_outputs, load_stock, stock_side

if TYPE_CHECKING:
    from PIL.Image import Image

    from regsurgery.pipeline import Progress

BATCH = 8


@dataclass(frozen=True)
class Batch:
    """Images that both models see.

    Attributes:
        pixels: preprocessed, `[B, 3, H, W]`.
        names: of each image; for image files their paths.
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
        """None before any image was seen."""
        return self.num_outliers / self.num_images if self.num_images else None


@dataclass(frozen=True)
class Pair:
    """The original and the patched model of one folder, as graphs.

    Attributes:
        folder: the patched folder as the user gave it, or an unpatched MODEL; then `patched` is `original`.
        original, patched: what can be observed; see `observer`.
        loaded: the original; its `preprocess` is that of both.
        traced, sites: the original's.
        recipe: None for an unpatched model.
        surgery: the surgery again, from which `patched` comes; None for an unpatched model, and for stock checkpoints
            of native mode, which are traced and matched by themselves.
        stock: the loaded stock checkpoint, there.
        outliers: is told of every image that an observer of this pair sees.
    """

    folder: str
    format: str
    mode: str
    original: Subject
    patched: Subject
    loaded: Loaded
    traced: Traced
    sites: Sites
    recipe: Recipe | None = None
    surgery: Surgery | None = None
    stock: Loaded | None = None
    outliers: OutlierCount = field(default_factory=OutlierCount)

    @property
    def is_same(self) -> bool:
        """Whether there is one model only."""
        return self.patched is self.original

    def batches(self, images: ImageSet, size: int = BATCH) -> Iterator[Batch]:
        """All images, preprocessed as the model wants them; names are read in the order of the source."""
        items = images.source.items(images.chosen)
        groups = iter(lambda: [name for name, _ in itertools.islice(items, size)], [])
        seen = -1
        for number, pixels in images.numbered_batches(size, self.loaded.preprocess):
            names = next(itertools.islice(groups, number - seen - 1, None))
            seen = number
            yield Batch(pixels, tuple(name for name in names if name not in images.broken))

    def observer(self, *, blocks: Sequence[int] = (), what: Sequence[str] = (), outputs: bool = False) -> PairObserver:
        """Looks at both models; see `observing.Observer`. The images that go through it are counted in `outliers`."""
        return PairObserver(self, blocks, what, outputs)

    def at_size(self, size: tuple[int, int]) -> Pair:
        """The same pair for images of another size (height, width), traced anew: 2 s for a ViT-Ti.

        Raises:
            UnsupportedModelError: the model takes one size only.
        """
        if size == self.traced.image_size:
            return self
        progress = pipeline.Progress()
        loaded = backends.library(self.loaded.library).at_size(self.loaded, size)
        traced, sites = pipeline.located(loaded, progress, size)
        original = _original(loaded, traced, sites)
        resized = replace(
            self, original=original, patched=original, loaded=loaded, traced=traced, sites=sites, surgery=None
        )
        if self.recipe is None:
            return resized
        if self.stock is not None:
            stock = backends.library(self.stock.library).at_size(self.stock, size)
            side = stock_side(
                stock, trace(stock, size), sites, self.recipe, self.recipe.num_registers, Path(self.folder)
            )
            return replace(resized, stock=stock, patched=_patched(side, self.mode, size, sites))
        assert self.surgery is not None
        if self.mode == "native":
            surgery = restored_native(loaded, self.recipe, traced, sites, self.surgery.edit)
        else:
            surgery = perform(loaded, self.recipe, traced, sites)
            if surgery.plan.num_added:
                take_our_tensors(surgery, Path(self.folder), self.format)
        return replace(resized, surgery=surgery, patched=_patched(sides(surgery)[1], self.mode, size, sites))


class PairObserver:
    """Looks at both models of a pair; one forward of each a batch."""

    def __init__(self, pair: Pair, blocks: Sequence[int], what: Sequence[str], outputs: bool) -> None:
        self.pair = pair
        probe = pair.sites.probe_block
        # Always looked at: whether there are outliers there says whether a difference is to be expected.
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
def open_pair(
    folder: str | Path,
    original: str | None = None,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> Iterator[Pair]:
    """Both models of a folder that regsurgery wrote, in any mode and format; or a MODEL that is not patched, alone.

    Its files are checked against its SHA256SUMS. The original is restored from the folder where it has all its tensors,
    else loaded from where it came or from `original`, as by `verify`.

    Raises:
        CheckpointError: the folder is incomplete, or `original` is not what was patched.
        UnsupportedModelError: the model has no sites.
    """
    progress = progress or pipeline.Progress()
    if not _is_patched(folder):
        if original is not None:
            raise UserError(f"{folder}: is not patched, so there is no original to give with --original")
        loaded, traced, sites = pipeline.load_and_locate(str(folder), options, progress)
        subject = _original(loaded, traced, sites)
        yield Pair(str(folder), loaded.library, "original", subject, subject, loaded, traced, sites)
        return
    root = existing_folder(folder)
    progress.stage("checksums")
    opened = open_patched(root)
    fmt, config, recipe = opened.format, opened.config, opened.recipe
    with tempfile.TemporaryDirectory(prefix="regsurgery-") as scratch:
        progress.stage("load")
        loaded = pipeline.original_of(opened, original, options, Path(scratch))
        traced, sites = pipeline.located(loaded, progress)
        surgery = stock = None
        if recipe.mode == "native" and fmt in backends.LIBRARIES:
            place = Path(scratch) / "stock"
            place.mkdir()
            stock_options = replace(options or LoadOptions(), max_memory=0 if loaded.stored else None)
            stock = load_stock(root, fmt, config, stock_options, place)
            stock_traced = trace(stock, traced.image_size)
            side = stock_side(stock, stock_traced, sites, recipe, config["regsurgery"]["num_registers"], root)
            patched = _stock(stock, stock_traced, side, sites, config["regsurgery"], fmt, loaded.library)
        else:
            if recipe.mode == "native":
                state = backends.backend(fmt).state(root)
                surgery = restored_native(loaded, recipe, traced, sites, state)
            else:
                surgery = perform(loaded, recipe, traced, sites)
                take_our_tensors(surgery, root, fmt)
            patched = _patched(sides(surgery)[1], recipe.mode, traced.image_size, sites)
        subject = _original(loaded, traced, sites)
        yield Pair(str(folder), fmt, recipe.mode, subject, patched, loaded, traced, sites, recipe, surgery, stock)


def _is_patched(folder: str | Path) -> bool:
    root = Path(folder)
    if not root.is_dir():
        return False
    if (root / backends.backend("pt2").CONFIG_NAME).is_file():
        return True
    from regsurgery.loading import read_config

    return "regsurgery" in read_config(root)[2]


def _original(loaded: Loaded, traced: Traced, sites: Sites) -> Subject:
    side = Side(loaded, traced.graph_module, sites, sites.patches, slice(0, 0))
    return Subject(side, "original", traced.image_size, sites.patches, slice(0, 0))


def _patched(side: Side, mode: str, size: tuple[int, int], sites: Sites) -> Subject:
    attended = sites.patched(1) if mode == "bias" else (side.patches, side.registers)
    return Subject(side, mode, size, *attended)


def _stock(
    stock: Loaded,
    stock_traced: Traced,
    side: Side,
    sites: Sites,
    block: dict[str, Any],
    fmt: str,
    library: str,
) -> Subject:
    """The stock checkpoint of native mode, with outputs by the original's names."""
    heads = {name for name, kind in block["outputs"].items() if kind == "head" and fmt == library}
    shared = heads & set(stock_traced.output_names)
    host = backends.backend(fmt, "native")

    def outputs_of(outputs: Any, images: Tensor) -> Any:
        if shared == set(block["outputs"]):
            return {name: outputs[name] for name in shared}
        images = images.to(next(stock.model.parameters()).device)
        return host_outputs(host, stock.model, images, block)

    return replace(_patched(side, "native", stock_traced.image_size, sites), outputs_of=outputs_of)


def normalisation(loaded: Loaded) -> tuple[Tensor, Tensor]:
    """(mean, scale) `[3, 1, 1]` with which the model's preprocessing makes (pixel - mean) * scale of pixels in [0, 1].

    Read off a black and a white picture, so that no library's way of writing them down is needed.

    Raises:
        UnsupportedModelError: the preprocessing does something else than normalise.
    """
    import PIL.Image

    height, width = loaded.image_size
    pictures = [PIL.Image.new("RGB", (width, height), (value,) * 3) for value in (0, 255, 51)]
    black_3, white_3, grey_3 = (loaded.preprocess([picture])[0].float().mean(dim=(1, 2)) for picture in pictures)
    scale_3 = white_3 - black_3
    if not torch.allclose(grey_3, black_3 + 0.2 * scale_3, atol=2e-2) or not bool((scale_3 > 0).all()):
        raise UnsupportedModelError(f"{loaded.source.id}: its preprocessing is no normalisation of pixels")
    return (-black_3 / scale_3)[:, None, None], scale_3[:, None, None]


def pixels_of(image: Image) -> Tensor:
    """An RGB picture as `[3, height, width]` in [0, 1], float32."""
    from torchvision.transforms.v2 import functional

    return functional.to_dtype(functional.pil_to_tensor(image), torch.float32, scale=True)
