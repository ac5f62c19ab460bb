"""What loading gives: a checkpoint, checked, and its model, ready for tracing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.watched import Watched
from regsurgery.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn


@dataclass(frozen=True)
class Converted:
    """What a checkpoint was converted from, because it was no folder of safetensors with the library's own names.

    Attributes:
        file: as the user gave it, or found in the folder.
        sha256: of the file; of the files' digests if there are several.
        notes: on what was read of it, each a clause.
    """

    file: Path
    sha256: str
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The entry `file` of a source in a patched config."""
        return {"name": self.file.name, "sha256": self.sha256, "read": "; ".join(self.notes)}

    @contextmanager
    def named(self, folder: Path) -> Iterator[None]:
        """Errors in the block name the file instead of the temporary `folder` that was made of it."""
        try:
            yield
        except UserError as error:
            inside = re.compile(rf"{re.escape(str(folder))}(/model\.safetensors|/open_clip_model\.safetensors)?")
            raise type(error)(inside.sub(lambda _: str(self.file), str(error))) from error


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from.

    Attributes:
        id: MODEL as the user gave it; `repo` is its Hub repository, if there is one.
        revision: the Hub commit.
        sha256: of its weight file; of the files' digests in name order if there are several.
        read_with: the options that decide how it is read, see `LoadOptions.reading`, where the user set them.
        converted: what the checkpoint was converted from, if it was.
    """

    id: str
    revision: str | None
    sha256: str
    repo: str | None = None
    read_with: Mapping[str, Any] = field(default_factory=dict)
    converted: Converted | None = None

    @property
    def name(self) -> str:
        """The model's name in a recipe: its Hub repository, the name of its folder, or `demo`."""
        return self.repo or Path(self.id).absolute().name

    def as_dict(self) -> dict[str, Any]:
        """The `source` entry of a patched config: with `repo` if that differs from `id`, the options it was read with,
        and `file`, what it was converted from.
        """
        repo = {} if self.repo in (None, self.id) else {"repo": self.repo}
        file = {} if self.converted is None else {"file": self.converted.as_dict()}
        return {"id": self.id, **repo, "revision": self.revision, "sha256": self.sha256, **self.read_with, **file}


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model, checked but not loaded.

    Attributes:
        library: `transformers`, `timm` or `open_clip`.
        folder: the checkpoint folder; read only. `scratch` keeps it alive if it is temporary.
        weights: its safetensors files.
        digests: the sha256 of each of `weights`.
        config: the library's own config file, parsed; `config_name` is that file's name.
        stored: whether the weights stay on disk, see `stored.py`.
        files: the source's files, as they were before they were read; a command that has read the last of them calls
            `files.check`.
    """

    source: Source
    library: str
    folder: Path
    weights: tuple[Path, ...]
    digests: tuple[str, ...]
    config: Mapping[str, Any]
    config_name: str
    stored: bool
    scratch: OwnedFolder | None
    files: Watched


@dataclass(frozen=True)
class Entry:
    """A module of a model that can be traced and called: a tower, or the whole model.

    Attributes:
        path: of the module, "" for the whole model.
        image_size, inputs, name_outputs: see `Loaded`.
    """

    path: str
    image_size: tuple[int, int]
    inputs: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
    name_outputs: Callable[[Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Loaded(Checkpoint):
    """A model ready for tracing, and the files it came from.

    Attributes:
        architecture: class or entry-point name from the config.
        model: the stock model in the checkpoint's dtype, in eval mode; on the CPU if no device map was given.
        image_size: (height, width) in pixels that the model was made for.
        preprocess: the model's own preprocessing, images -> `[B, C, height, width]` in the model's dtype.
        preprocess_at: (height, width) -> the same preprocessing for that image size, cropping the same share.
        preprocess_note: one line that says where the preprocessing comes from.
        inputs: images `[B, C, H, W]` -> (args, kwargs) of the model's forward; a text tower gets a dummy text.
        name_outputs: what forward returns -> its tensors by name.
        disk_name: name of a parameter in memory -> its name in the checkpoint file; None if the file has no tensor
            of its own for it (a part of a fused one).
        added_name: (name in memory, name by its place on disk) of a tensor that is added -> the name on disk that
            the library finds it by.
        entry: path of the module that is traced and called, "" for the whole model; a vision tower inside a model that
            cannot be traced whole.
        own: the same checkpoint at the size it was made for, if `image_size` is another one.
        channels: C, of its images.
        entries: what can be traced, in the order in which to try, if there is a choice; the first is `entry`.
        tower: the module whose stream of tokens is patched, if the user named one.
    """

    architecture: str
    model: nn.Module
    image_size: tuple[int, int]
    preprocess: Callable[[list[Image]], Tensor]
    preprocess_at: Callable[[tuple[int, int]], Callable[[list[Image]], Tensor]]
    preprocess_note: str
    inputs: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
    name_outputs: Callable[[Any], dict[str, Tensor]]
    disk_name: Callable[[str], str | None]
    added_name: Callable[[str, str], str] = lambda in_memory, on_disk: on_disk
    entry: str = ""
    own: Loaded | None = None
    channels: int = 3
    entries: tuple[Entry, ...] = ()
    tower: str | None = None

    def entered(self, entry: Entry) -> Loaded:
        """The checkpoint, traced and called at `entry`."""
        inner = replace(
            self,
            entry=entry.path,
            inputs=entry.inputs,
            name_outputs=entry.name_outputs,
            entries=(),
            own=None if self.own is None else self.own.entered(entry),
        )
        if self.own is not None or entry.image_size == self.image_size:
            return inner
        return replace(inner, image_size=entry.image_size, preprocess=self.preprocess_at(entry.image_size))

    def at_tower(self, path: str) -> Loaded:
        """The checkpoint, whose stream of tokens in the module `path` is patched.

        Raises:
            UserError: the model has no such module.
        """
        names = [name for name, _ in self.model.named_modules()]
        if path not in names:
            near = did_you_mean(path, names)
            raise UserError(f"--tower {path}: {type(self.model).__name__} has no such module{near}")
        return replace(self, tower=path)

    def resized(self, model: nn.Module, size: tuple[int, int]) -> Loaded:
        """The checkpoint with `model`, which takes images of another size (height, width), preprocessed for it."""
        note = f"{(self.own or self).preprocess_note}, at {size[0]}x{size[1]} pixels"
        return replace(
            self,
            model=model,
            image_size=size,
            preprocess=self.preprocess_at(size),
            preprocess_note=note,
            own=self.own or self,
        )

    def call(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Run `model`, a stock or patched model of this checkpoint, on `images` `[B, C, H, W]`."""
        args, kwargs = self.inputs(images)
        return self.name_outputs(model.get_submodule(self.entry)(*args, **kwargs))


def inside(path: str, module: str) -> bool:
    """Whether the module `path` is `module` or a part of it; "" is the whole model."""
    return module == "" or path == module or path.startswith(f"{module}.")
