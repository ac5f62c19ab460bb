"""The options of commands: one definition for the keyword arguments of the API, the command line and the run record.

A command is a function of its positional arguments and one frozen dataclass of this file. `takes` makes it callable
with the dataclass's fields as keywords; `cli.options` makes an option of every field that has a `Flag`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from regsurgery.errors import UserError, did_you_mean
from regsurgery.formats import FORMATS, LIBRARIES, require
from regsurgery.modes import MODES
from regsurgery.progress import Progress

if TYPE_CHECKING:
    from regsurgery.images.image_set import ImageSet
    from regsurgery.recipe import Recipe

Result = TypeVar("Result")
READING = ("arch", "ema", "prefix", "library", "subfolder")  # fields of `LoadOptions`, which records keep
OF_REFERENCE = ("norm_threshold", "detect_block", "top_layer", "top_k")  # fields of `SearchOptions`
PRECISIONS = ("checkpoint", "bf16")


@dataclass(frozen=True)
class Flag:
    """How the command line shows a field.

    Attributes:
        help: its help text.
        names: its flags; by default `--` and the field's name.
        type: what the command line turns it into, if that is not the field's own type; as an annotation.
        metavar: placeholder for its value in the help text; by default derived from the type or the field's name.
        complete: name of the function in `cli.completion` that offers values.
        shown: show the default in the help text.
    """

    help: str
    names: tuple[str, ...] = ()
    type: str | None = None
    metavar: str | None = None
    min: int | None = None
    complete: str | None = None
    shown: bool = True


def option(default: Any, help: str, *names: str, **how: Any) -> Any:
    """A field that is also an option of the command line; `how` holds further attributes of `Flag`."""
    return field(default=default, metadata={"flag": Flag(help, names, **how)})


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the user allows while loading.

    Attributes:
        arch: architecture of a weights file that does not say it: `timm:NAME`, `transformers:CONFIG_DIR_OR_ID` or
            `open_clip:ARCH`.
        ema: take the averaged weights of a file that has two sets, or the trained ones; by default those that the
            library's own loader takes.
        prefix: what the names of the model's tensors begin with in a file that holds several models.
        library: whose files to take from a folder that holds those of several libraries.
        subfolder: the folder inside MODEL that holds the checkpoint.
        device_map: where the model runs, in accelerate's terms: `auto`, or a device such as `cuda`; default: the CPU.
        max_memory: bytes, or text such as 8GB; the weights of a larger checkpoint stay on disk and are read operator
            by operator. Default: half of the machine's free memory. It does not bound conversion, which holds a file's
            tensors and the library's model.
        tower: path of the module whose stream of tokens is patched; needed where several match.
        sha256: the required `Source.sha256`; anything by default.
        commit: the Hub commit that a record names; it goes before `revision` and a revision in MODEL.
        called: the model's name in what is written; by default the MODEL given.
        progress: is told how far the command has got.
    """

    arch: str | None = option(
        None,
        "Architecture of a weights file: timm:NAME, transformers:CONFIG_DIR_OR_ID or open_clip:ARCH.",
        metavar="LIBRARY:NAME",
    )
    ema: bool | None = option(
        None,
        "Take the averaged weights of a file that has both (default: as its library does).",
        "--ema/--no-ema",
        shown=False,
    )
    prefix: str | None = option(None, "What the model's tensor names begin with, in a file of several models.")
    library: str | None = option(
        None, f"Whose files to take from a folder that has several: {', '.join(LIBRARIES)}.", complete="libraries"
    )
    subfolder: str | None = option(None, "The folder inside MODEL that holds the checkpoint.", metavar="NAME")
    allow_pickle: bool = option(False, "Read pickled weights (weights_only).")
    trust_remote_code: bool = option(False, "Run code that comes with the checkpoint.")
    revision: str | None = option(None, "Hub revision of MODEL.")
    device_map: str | None = option(
        None,
        "Where the model runs: auto (accelerate), cuda, ... (default: CPU).",
        metavar="DEVICE",
        complete="devices",
    )
    max_memory: int | str | None = option(
        None,
        "Leave the weights of larger checkpoints on disk, e.g. 8GB (default: half of the free memory). What is "
        "converted first is read whole all the same.",
        type="str | None",
        metavar="SIZE",
    )
    tower: str | None = option(
        None, "The module whose stream of tokens is patched, where several match.", metavar="PATH"
    )
    sha256: str | None = None
    commit: str | None = None
    called: str | None = None
    progress: Progress = field(default_factory=Progress, compare=False)

    HIDDEN: ClassVar[tuple[str, ...]] = ()  # fields that are not options of this command

    @property
    def reading(self) -> dict[str, Any]:
        """The options that decide how MODEL is read, where they are set."""
        given = {name: getattr(self, name) for name in READING}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes.

        Raises:
            UserError: it is text but not a size.
        """
        return parse_size(self.max_memory) if isinstance(self.max_memory, str) else self.max_memory

    def checked(self) -> None:
        """Raise `UserError` for values that cannot work, before anything heavy is imported."""
        _ = self.max_bytes
        if self.library is not None:
            _one_of("library", self.library, LIBRARIES)


@dataclass(frozen=True, kw_only=True)
class ImageOptions(LoadOptions):
    """The images that a command runs on.

    Attributes:
        images: where they are (see `images.image_set.image_set`), or the images themselves.
        num_images: maximum number; default: all, or 32 generated ones.
        image_size: side in pixels; default: the model's own.
        seed: for generated pictures.
    """

    images: str | Path | ImageSet | None = option(
        None,
        "Folder of images, parquet or arrow files, or WebDataset tars (default: generated dead-leaves pictures).",
        type="Path | None",
    )
    num_images: int | None = option(None, "Maximum number of images.", min=1)
    image_size: int | None = option(None, "Side of the square images in pixels (default: the model's own).", min=1)
    seed: int = option(0, "Seed for generated pictures and random controls.")

    def image_set(self) -> ImageSet:
        """The images, opened.

        Raises:
            UserError: see `images.image_set.image_set`.
        """
        from regsurgery.images.image_set import ImageSet, image_set

        if isinstance(self.images, ImageSet):
            return self.images
        return image_set(self.images, self.num_images, seed=self.seed, say=self.progress.say)


@dataclass(frozen=True, kw_only=True)
class DoctorOptions(ImageOptions):
    """Options of `doctor`."""

    HIDDEN = ("seed",)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(ImageOptions):
    """What the user may choose in a search for register neurons.

    Attributes:
        force: search even if the model was trained with registers.
        precision: of the pass over all images: `checkpoint` (the checkpoint's dtype), or `bf16` (autocast, with sums
            in float32 and float64). Decisions on the pilot's images always use the checkpoint's dtype.
        smallest: the smallest set of neurons that suppresses the outlier tokens, with one register, whatever the drift.
        num_registers: the number of registers; default: the number with the least drift.
        compat: one of `recipe.COMPATS`. With `reference` the recipe is that of the authors' method as they published it
            (`search.reference`), with one shared extreme per block; ours is tried beside it.
        norm_threshold, detect_block, top_layer, top_k: its hyperparameters. Defaults: mean + 3 standard deviations of
            the patch norms, the last but one block, the block where outliers emerge, and the smallest number of neurons
            that suppresses them.
    """

    num_registers: int | None = option(
        None, "Number of register tokens (default: the number that changes the outputs least).", min=1
    )
    smallest: bool = option(False, "Use the smallest set of neurons and one register (the paper's setting).")
    force: bool = option(False, "Search even if the model was trained with registers.")
    precision: str = option(PRECISIONS[0], "Precision of the pass over all images: checkpoint, or bf16 (autocast).")
    compat: str = option("none", "reference: the authors' method as published, beside ours; see docs/differences.md.")
    norm_threshold: float | None = option(None, "Of the reference: norm above which a patch is an outlier.")
    detect_block: int | None = option(None, "Of the reference: block after which norms are taken (from 0).")
    top_layer: int | None = option(None, "Of the reference: last block whose neurons are ranked (from 0).")
    top_k: int | None = option(None, "Of the reference: number of neurons.", min=1)

    @property
    def registers_are_free(self) -> bool:
        """Whether the number of registers is for the search to choose."""
        return not self.smallest and self.num_registers is None

    @property
    def decisive(self) -> dict[str, Any]:
        """What the outcome of a search depends on, other than model and images."""
        names = ("seed", "force", "precision", "smallest", "num_registers", "compat", *OF_REFERENCE)
        return {name: getattr(self, name) for name in names}

    def checked(self) -> None:
        super().checked()
        _one_of("precision", self.precision, PRECISIONS)
        from regsurgery.recipe import COMPATS, MAX_REGISTERS

        _one_of("compat", self.compat, COMPATS)
        for name in OF_REFERENCE:
            if self.compat == COMPATS[0] and getattr(self, name) is not None:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {getattr(self, name)}: goes with --compat reference")
        if self.norm_threshold is not None and not 0 < self.norm_threshold < float("inf"):
            raise UserError(f"--norm-threshold {self.norm_threshold}: must be a positive number")
        if self.num_registers is not None and not 1 <= self.num_registers <= MAX_REGISTERS:
            raise UserError(f"--num-registers {self.num_registers}: must be from 1 to {MAX_REGISTERS}")


@dataclass(frozen=True, kw_only=True)
class FindOptions(SearchOptions):
    """Options of `find`.

    Attributes:
        merge: statistics files of all parts, in any order, that `find_part` wrote for the same model, images and
            options: decide from them, without a pass over the images. The recipe equals that of a search in one
            process.
    """

    merge: Sequence[str | Path] = ()


@dataclass(frozen=True, kw_only=True)
class PatchOptions(SearchOptions):
    """Options of `patch`.

    Attributes:
        recipe: a `Recipe`, a recipe file, the name of a bundled recipe, or `USER/NAME` of a patched repository on the
            Hub, of which nothing else is fetched. By default the bundled one for the model, if
            there is one and its verification passes; otherwise the neurons are found.
        mode: one of `modes.MODES`; by default the recipe's.
        calibrate: native mode: train the register neurons' output columns on the images; by default if photos are
            given and all weights are in memory. On generated pictures the result is kept only if it also helps on
            pictures of another kind.
        stop_after: native mode: end calibration after that many steps, to repeat a run that was interrupted there.
        searched: although `recipe` is given, verify only on images that a search would have held out.
        format: one of `formats.FORMATS`; by default the format of the model's library, or in native mode that of a
            stock host.
        link: hard-link unchanged shards, if the file system can.
        verification: compare the original and the patched model on images; without it, the written model is loaded and
            run on one generated picture, the folder is recorded as unverified, and files whose sha256 the Hub published
            are not checked for NaN.
        strict: treat verification warnings, and too few images to judge, as failures.
        dry_run: do everything, but write nothing.
    """

    recipe: str | Path | Recipe | None = option(
        None,
        "Recipe file, name of a bundled recipe, or USER/NAME of a patched repository.",
        type="str | None",
        complete="recipes",
    )
    mode: str | None = option(None, "shift, native or bias (default: the recipe's).", complete="modes")
    calibrate: bool | None = option(
        None,
        "Native mode: train what the registers hold (default: if --images gives photos and the weights fit in memory).",
        "--calibrate/--no-calibrate",
        shown=False,
    )
    stop_after: int | None = None
    searched: bool = False
    format: str | None = option(None, f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}.", complete="formats")
    link: bool = option(False, "Hard-link unchanged shards instead of copying.")
    verification: bool = option(True, "Compare the original and the patched model on images.", "--verify/--no-verify")
    strict: bool = option(False, "Fail if the verdict has warnings or rests on too few images.")
    dry_run: bool = option(False, "Do everything, but write nothing.")

    HIDDEN = ("precision",)

    def checked(self) -> None:
        super().checked()
        if self.format is not None:
            _one_of("format", self.format, FORMATS)
        if self.mode is not None:
            _one_of("mode", self.mode, tuple(MODES))
        if self.format is not None:
            require(self.format)

    @property
    def links(self) -> bool:
        """Whether unchanged shards are hard links."""
        return self.link or self.dry_run


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(ImageOptions):
    """Options of `verify`.

    Attributes:
        original: MODEL to compare with; by default the one that was patched.
        strict: treat warnings, and too few images to judge, as failures.
    """

    original: str | None = option(None, "MODEL to compare with (default: the one that was patched).", metavar="MODEL")
    strict: bool = option(False, "Fail if the verdict has warnings or rests on too few images.")
    revision: str | None = option(None, "Hub revision.")

    HIDDEN = ("seed", "tower", *READING)


@dataclass(frozen=True, kw_only=True)
class CheckOptions(ImageOptions):
    """Options of `check`."""

    num_images: int | None = option(8, "Maximum number of images.", min=1)
    revision: str | None = option(None, "Hub revision.")

    HIDDEN = ("seed", "tower", "device_map", "max_memory", "allow_pickle", *READING)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ImageOptions):
    """Options of every task of `eval`.

    Attributes:
        original: MODEL to compare with, if the folder cannot restore the original.
        png: picture to write, for tasks that draw one; see `evaluation.pictures.DRAWN`.
    """

    original: str | None = option(None, "MODEL to compare with (default: the one that was patched).", metavar="MODEL")
    png: str | Path | None = option(None, "Write a picture.", type="Path | None")

    @property
    def settings(self) -> dict[str, Any]:
        """The task's own options that the user set, by name; of a list, each value once: one that is given twice would
        be measured twice, and count as twice as many images.
        """
        common = {one.name for one in fields(EvaluateOptions)}
        own = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in common}
        once = {
            name: list(dict.fromkeys(value)) if isinstance(value, list | tuple) else value
            for name, value in own.items()
        }
        return {name: value for name, value in once.items() if value is not None and value != []}

    HIDDEN = ("allow_pickle", "revision", "image_size", *READING)


@dataclass(frozen=True, kw_only=True)
class BlockOptions(EvaluateOptions):
    """Options of `eval norms`, `attention`."""

    block: int | None = option(None, "Only this block (from 0).")


@dataclass(frozen=True, kw_only=True)
class ClassifyOptions(EvaluateOptions):
    """Options of `eval classify`."""

    prompts: str | Path | None = option(
        None, "Zero-shot: a file with one class per line, its prompts separated by tabs.", type="Path | None"
    )


@dataclass(frozen=True, kw_only=True)
class ControlsOptions(EvaluateOptions):
    """Options of `eval controls`."""

    draws: int | None = option(None, "Number of random neuron sets.", min=1)


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(EvaluateOptions):
    """Options of `eval latency`."""

    runs: int | None = option(None, "Number of paired runs.", min=4)
    batch: int | None = option(None, "Images per batch.", min=1)


@dataclass(frozen=True, kw_only=True)
class ProbeOptions(EvaluateOptions):
    """Options of `eval probe`."""

    features: str | None = option(None, "cls (the class token) or mean (of the patches).")
    block: int | None = option(None, "Features of this block (from 0).")
    train: str | Path | None = option(
        None, "Labelled images to train on, instead of a part of --images.", type="Path | None"
    )


@dataclass(frozen=True, kw_only=True)
class KnnOptions(ProbeOptions):
    """Options of `eval knn`."""

    neighbours: int | None = option(None, "Number of neighbours that vote.", min=1)


@dataclass(frozen=True, kw_only=True)
class LostOptions(EvaluateOptions):
    """Options of `eval lost`."""

    block: int | None = option(None, "Features of this block (from 0).")
    kind: Sequence[str] | None = option(
        None, "keys, queries or values (default: all). May be repeated.", type="list[str] | None"
    )
    bias: Sequence[float] | None = option(
        None, "Number added to similarities (default: 0, -0.2 and -0.4). May be repeated.", type="list[float] | None"
    )


@dataclass(frozen=True, kw_only=True)
class CorrespondenceOptions(EvaluateOptions):
    """Options of `eval correspondence`."""

    block: Sequence[int] | None = option(
        None, "Features of this block, from 0 (default: the last four). May be repeated.", type="list[int] | None"
    )
    kind: Sequence[str] | None = option(
        None, "tokens, queries, keys or values (default: all). May be repeated.", type="list[str] | None"
    )
    warp: Sequence[str] | None = option(
        None, "homography or mirror (default: both). May be repeated.", type="list[str] | None"
    )


@dataclass(frozen=True, kw_only=True)
class ForegroundOptions(EvaluateOptions):
    """Options of `eval foreground`."""

    block: Sequence[int] | None = option(
        None, "Features of this block, from 0 (default: the last four). May be repeated.", type="list[int] | None"
    )
    kind: Sequence[str] | None = option(
        None, "tokens, queries, keys or values (default: all). May be repeated.", type="list[str] | None"
    )
    method: Sequence[str] | None = option(
        None, "kmeans or ncut (default: both). May be repeated.", type="list[str] | None"
    )


@dataclass(frozen=True, kw_only=True)
class SegmentOptions(EvaluateOptions):
    """Options of `eval segment`."""

    masks: str | Path | None = option(None, "Folder of PNG files of class indices.", type="Path | None")
    method: str | None = option(None, "linear or kmeans.")
    block: int | None = option(None, "Features of this block (from 0).")


@dataclass(frozen=True, kw_only=True)
class ShiftMapOptions(EvaluateOptions):
    """Options of `eval shift-map`."""

    where: str | None = option(None, "Box to move outliers to, as fractions or in pixels.", metavar="X,Y,W,H")
    mask: str | Path | None = option(None, "Image, white where outliers go.", type="Path | None")


@dataclass(frozen=True, kw_only=True)
class ReportOptions(ImageOptions):
    """Options of `report`.

    Attributes:
        num_images: maximum number.
        original: MODEL to compare with, if the folder cannot restore the original.
        boxes: find LOST's boxes; the page draws them on demand.
        block: of LOST's features; default: the fourth from the end.
        kind: of LOST's features: keys, queries or values.
        bias: added to LOST's similarities.
        live: also write a page that runs both models in the browser, see `reporting.live`.
        onnxruntime_web: the archive of onnxruntime-web for that page; by default it is fetched once.
    """

    num_images: int | None = option(16, "Maximum number of images.", min=1)
    original: str | None = option(None, "MODEL to compare with (default: the one that was patched).", metavar="MODEL")
    boxes: bool = option(True, "Find LOST's boxes; the page draws them on demand.", "--boxes/--no-boxes")
    block: int | None = option(None, "Block of LOST's features (default: the fourth from the end).")
    kind: str = option("keys", "LOST's features: keys, queries or values.")
    bias: float = option(-0.2, "Number added to LOST's similarities.")
    live: bool = option(False, "Also write a page that runs both models in the browser, on photos of its reader.")
    onnxruntime_web: str | Path | None = option(
        None,
        "For --live: the file that npm pack onnxruntime-web writes (default: fetched once from the npm registry).",
        type="Path | None",
        metavar="FILE",
    )

    HIDDEN = ("allow_pickle", "revision", "image_size", "seed", *READING)

    def checked(self) -> None:
        super().checked()
        if self.live:
            require("onnx", "--live")
        elif self.onnxruntime_web is not None:
            raise UserError(f"--onnxruntime-web {self.onnxruntime_web}: goes with --live")


@dataclass(frozen=True, kw_only=True)
class SurveyOptions(ImageOptions):
    """Options of `survey`.

    Attributes:
        images: where they are; every stage opens them itself.
        voc: images in VOC layout, for `eval lost`.
        labelled: images with labels, for `eval classify`.
        prompts: of the labels' classes, for models with a text tower.
        num_scored: maximum number of images of `voc`, and of `labelled`.
        mode: those of `modes.MODES` that are tried; by default all.
        only: names of models in the list; by default all.
        keep: keep the patched folders.
        free_cache: remove every model from the Hub's cache after its turn, unless it was there before.
        retry: run again the stages that failed.
    """

    voc: str | Path | None = option(None, "Images in VOC layout, for object discovery (LOST).", type="Path | None")
    labelled: str | Path | None = option(None, "Images with labels, for accuracy.", type="Path | None")
    prompts: str | Path | None = option(
        None, "Zero-shot: a file with one class per line, its prompts separated by tabs.", type="Path | None"
    )
    num_scored: int | None = option(None, "Maximum number of images of --voc, and of --labelled.", min=1)
    mode: Sequence[str] | None = option(
        None, "shift, native or bias (default: all). May be repeated.", type="list[str] | None", complete="modes"
    )
    only: Sequence[str] | None = option(
        None, "Name of a model in LIST (default: all). May be repeated.", type="list[str] | None", metavar="NAME"
    )
    keep: bool = option(False, "Keep the patched folders.")
    free_cache: bool = option(
        False, "Remove each model from the Hub's cache after its turn, if it was not there before."
    )
    retry: bool = option(False, "Run again what failed.")

    HIDDEN = ("image_size", "revision", "tower", *READING)

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes to try, in the order of `modes.MODES`."""
        return tuple(mode for mode in MODES if not self.mode or mode in self.mode)

    def checked(self) -> None:
        super().checked()
        for mode in self.mode or ():
            _one_of("mode", mode, tuple(MODES))
        if self.prompts is not None and self.labelled is None:
            raise UserError(f"--prompts {self.prompts}: goes with --labelled, the images of its classes")
        for name in ("images", "voc", "labelled", "prompts"):
            where = getattr(self, name)
            if where is not None and not isinstance(where, (str, Path)):
                raise UserError(f"--{name}: give a path, which every stage opens itself")
            if where is not None and not Path(where).exists():
                raise UserError(f"--{name} {where}: no such file or folder; check the spelling")


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions(LoadOptions):
    """Options of `reproduce`; the revision comes from the record.

    Attributes:
        images: the images of the run, if it used photos.
        source: where the original model is now; by default where it was when it was patched.
    """

    images: str | Path | None = option(None, "The images of that run, if it used photos.", type="Path | None")
    source: str | None = option(None, "Where the original MODEL is now, if it has moved.", metavar="MODEL")

    HIDDEN = ("revision", "device_map", "tower", *READING)


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of `push`.

    Attributes:
        private: visibility of a new repository; default: the account's setting.
        revision: branch to push to.
        message: the commit message.
        create_pr: open a pull request instead.
        force: replace the contents of a repository that regsurgery did not write.
        dry_run: list files and sizes without pushing.
        space: push the report, and its live page if it has one, as a static Space too; see `hub.space`.
        space_name: USER/NAME of the Space; default: the repository's, with `-report` after it.
        report: the report's file; default: where `report` writes it.
    """

    private: bool | None = option(
        None, "Visibility of a new repository (default: account setting).", "--private/--public"
    )
    revision: str | None = option(None, "Branch to push to.", metavar="BRANCH")
    message: str | None = option(None, "Commit message.", "--message", "--commit-message")
    create_pr: bool = option(False, "Open a pull request instead.")
    force: bool = option(False, "Replace the contents of a repository that regsurgery did not write.")
    dry_run: bool = option(False, "List files and sizes without pushing.")
    space: bool = option(False, "Push the report, its photos and its live page as a static Space too.")
    space_name: str | None = option(None, "Of the Space (default: USER/NAME-report).", metavar="USER/NAME")
    report: str | Path | None = option(
        None, "For --space: the report (default: FOLDER-report.html).", type="Path | None", metavar="FILE"
    )
    progress: Progress = field(default_factory=Progress, compare=False)

    HIDDEN: ClassVar[tuple[str, ...]] = ()

    def checked(self) -> None:
        """Raise `UserError` for options that do not go together."""
        for name in ("space_name", "report"):
            if getattr(self, name) is not None and not self.space:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name)}: goes with --space")
        if self.space and (self.create_pr or self.revision is not None):
            raise UserError("--space: goes to the Space's main branch; leave out --revision and --create-pr")


def takes(options: type[Any]) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Make a function of `(..., options)` callable with the fields of the dataclass `options` as keywords.

    The options may be given as one object, as keywords, or both; keywords win. `progress=None` means silence.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        own = inspect.signature(function)
        positional = [name for name in own.parameters if name != "options"]
        known = {one.name: one for one in fields(options)}
        keywords = [
            inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=_default(one), annotation=one.type)
            for one in known.values()
        ]

        @functools.wraps(function)
        def call(*args: Any, options: Any = None, **given: Any) -> Result:
            if len(args) > len(positional) and options is None:
                *args, options = args  # type: ignore[assignment]
            named = {name: given.pop(name) for name in positional if name in given}
            for name in given:
                if name not in known:
                    hint = did_you_mean(name, [*positional, *known])
                    raise TypeError(f"{function.__name__}() got an unexpected keyword argument {name!r}{hint}")
            return function(*args, **named, options=filled(made, given, options))

        made = options
        parameters = [one for name, one in own.parameters.items() if name != "options"]
        call.__signature__ = own.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
        return call

    return decorate


def filled(kind: type[Any], given: Mapping[str, Any], options: Any = None) -> Any:
    """Checked options of the dataclass `kind`: `options`, if there are any, with what is `given` by name instead.

    `progress` None means silence.
    """
    named = {name: value for name, value in given.items() if name != "progress" or value is not None}
    chosen = kind(**named) if options is None else replace(options, **named)
    chosen.checked()
    return chosen


def _default(one: Any) -> Any:
    return None if one.name == "progress" else one.default


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} {value}: not one of {', '.join(known)}{did_you_mean(value, list(known))}")


def parse_size(text: str) -> int:
    """A number of bytes as people write it: 8GB, 500MB, 1.5GiB, 0.

    Raises:
        UserError: `text` is not a size.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return int(text) if text.isdecimal() else convert_file_size_to_int(text)
    except ValueError as error:
        raise UserError(f"--max-memory {text}: not a size such as 8GB, 500MB or 1.5GiB") from error
