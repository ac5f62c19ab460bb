"""Reading patched folders: their format, their config, their module and the tensors that were added."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.backends.formats import backend as backend_of
from regsurgery.backends.modeling import UNKNOWN_CODE
from regsurgery.checkpoints.limits import BROKEN, read_json, refuse_links_out
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.sums import SUMS_NAME, check_sums, read_sums
from regsurgery.checkpoints.watched import Watched
from regsurgery.errors import CheckpointError, UserError, in_short
from regsurgery.formats import LIBRARIES, PROGRAM_CONFIG, PROGRAMS, STOCK_CODE, WEIGHTS_NAMES
from regsurgery.frontends.bounds import bounded_model
from regsurgery.frontends.libraries import frontend
from regsurgery.modes import MODES, Mode
from regsurgery.recipe import RECIPE_NAME, Recipe, find_recipe

if TYPE_CHECKING:
    from torch import nn

    from regsurgery.compiler.surgery import Surgery

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def load(folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> nn.Module:
    """The patched model of a folder that regsurgery wrote, or of a Hub repository, in eval mode.

    Runs the folder's own loader file if it is, byte for byte, what this or a released regsurgery writes; a `.pt2` if
    it holds nothing but operators and tensors.

    Args:
        folder: the folder, or USER/NAME on the Hub.
        revision: Hub revision.
        trust_remote_code: run any code in the folder.

    Raises:
        ModelNotFoundError: there is no such folder, and the repository does not exist or cannot be reached.
        CheckpointError: the files do not match SHA256SUMS (which a folder that a library saved after training lacks),
            its code needs `trust_remote_code`, or the model cannot be built from it.
    """
    root = at_home(folder, revision)
    if (root / SUMS_NAME).exists():
        check_sums(root, f"patch the model again; if you changed it yourself (by training, say), remove {SUMS_NAME}")
    fmt = folder_format(root)
    _refuse_foreign_code(root, fmt, trusted=trust_remote_code)
    return reloaded(root, fmt, trusted=trust_remote_code)


def at_home(folder: str | Path, revision: str | None = None) -> Path:
    """`folder`, or the download of the Hub repository of that name, whose files are checked; see `load`."""
    if isinstance(folder, Path) or Path(folder).is_dir() or not HUB_ID.fullmatch(folder):
        return existing_folder(folder)
    from regsurgery.checkpoints.download import snapshot

    root = existing_folder(snapshot(folder, folder, revision)[0])
    check_sums(root, "remove it from the Hub's cache (hf cache rm) and load it again")
    return root


def _refuse_foreign_code(root: Path, fmt: str, *, trusted: bool) -> None:
    """Raise `CheckpointError` for code that is not trusted before anything else is done with the folder."""
    foreign = None if trusted else backend_of(fmt, patched_mode(root, fmt)).foreign_code(root)
    if foreign is not None:
        raise CheckpointError(f"{root / foreign}: {UNKNOWN_CODE}")


def rebuilt(
    folder: Path,
    config: dict[str, Any],
    fmt: str,
    *,
    stored: bool,
    image_size: tuple[int, int] | None = None,
    trusted: bool = False,
) -> nn.Module:
    """The patched model of a folder, as a user would get it.

    Args:
        trusted: run any code in the folder.
        stored: keep its weights on disk if possible.
        image_size: for images of this size (height, width), if it is not the model's own; a program has one size.
    """
    backend = backend_of(fmt, MODES[config["regsurgery"]["mode"]])
    options: dict[str, Any] = {}
    if fmt in LIBRARIES:
        options = {**({"stored": True} if stored else {}), **({"image_size": image_size} if image_size else {})}
    return backend.reload(folder, config, trusted=trusted, **options)


def reloaded(
    folder: Path,
    fmt: str,
    *,
    stored: bool = False,
    image_size: tuple[int, int] | None = None,
    trusted: bool = False,
    config: dict[str, Any] | None = None,
) -> nn.Module:
    """The patched model of a folder that may be broken; `stored`, `image_size` and `trusted`: see `rebuilt`.

    Args:
        config: of the folder, if it was read.

    Raises:
        CheckpointError: the folder's own loader file, or the stock host, cannot build it, or its code is not trusted.
    """
    config = read_patched_config(folder, fmt) if config is None else config
    backend = backend_of(fmt, MODES[config["regsurgery"]["mode"]])
    name = WEIGHTS_NAMES.get(fmt)
    headers = [read_header(path) for path in weight_files(folder, name)] if name else []
    unloadable = frontend(fmt).UNLOADABLE if fmt in LIBRARIES else BROKEN
    try:
        if not headers:
            return rebuilt(folder, config, fmt, stored=stored, image_size=image_size, trusted=trusted)
        with bounded_model(folder / backend.CONFIG_NAME, headers):
            return rebuilt(folder, config, fmt, stored=stored, image_size=image_size, trusted=trusted)
    except unloadable as error:
        reason = in_short(error)
        raise CheckpointError(f"{folder}: its model cannot be built: {reason}; patch the model again") from error


def existing_folder(folder: str | Path) -> Path:
    """`folder` as a path; `UserError` if it does not exist."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give one that regsurgery patch wrote")
    refuse_links_out(root)
    return root


def folder_format(folder: Path) -> str:
    """The format in which a patched folder was written."""
    from regsurgery.frontends.config import read_config

    program = folder / PROGRAM_CONFIG
    if program.is_file():
        fmt = read_json(program, "patch the model again").get("format")
        known = (*STOCK_CODE, *PROGRAMS)
        if fmt not in known:
            raise CheckpointError(f"{program}: its 'format' is not one of {', '.join(known)}; patch the model again")
        return fmt
    library, name, config = read_config(folder)
    if "regsurgery" not in config:
        raise UserError(
            f"{folder / name}: has no 'regsurgery' entry, so it is not a patched checkpoint; patch it first"
        )
    return library


def read_patched_config(folder: Path, fmt: str) -> dict[str, Any]:
    """The config of a patched folder; its `regsurgery` entry has a mode and a source.

    Raises:
        CheckpointError: the config is missing or broken, or its `regsurgery` entry is not valid.
    """
    path = folder / backend_of(fmt).CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; patch the model again")
    config = read_json(path, "patch the model again")
    block = config.get("regsurgery")
    source = block.get("source") if isinstance(block, dict) else None
    source = source if isinstance(source, dict) else {}
    texts = [source.get(key) for key in ("id", "sha256")]
    if (
        not isinstance(block, dict)
        or block.get("mode") not in tuple(MODES)
        or not all(isinstance(t, str) for t in texts)
        or not isinstance(source.get("revision"), str | None)
        or not isinstance(block.get("tower"), str | None)
    ):
        raise CheckpointError(f"{path}: its 'regsurgery' entry is not one that regsurgery wrote; patch the model again")
    return config


@dataclass(frozen=True)
class PatchedFolder:
    """The metadata of a patched folder.

    Attributes:
        config: see `read_patched_config`.
        files: those that SHA256SUMS lists, as they were before they were read, with their sha256.
        trusted: the user allows any code in it.
    """

    root: Path
    format: str
    config: dict[str, Any]
    recipe: Recipe
    files: Watched
    trusted: bool


def open_patched(root: Path, *, trusted: bool) -> PatchedFolder:
    """The folder `root`, with its files checked.

    Raises:
        CheckpointError: files are missing, broken, or not those of SHA256SUMS, or code in it is not trusted.
        UserError: it is not a patched folder.
    """
    files = Watched.of([root / SUMS_NAME, *(root / name for name in read_sums(root))])
    with files.blamed():
        files = files.knowing(check_sums(root))
        fmt = folder_format(root)
        _refuse_foreign_code(root, fmt, trusted=trusted)
        config, recipe = read_patched_config(root, fmt), find_recipe(str(root / RECIPE_NAME))
    return PatchedFolder(root, fmt, config, recipe, files, trusted)


def patched_mode(folder: Path, fmt: str) -> Mode:
    """The mode in which a patched folder was written."""
    return MODES[read_patched_config(folder, fmt)["regsurgery"]["mode"]]


def take_our_tensors(surgery: Surgery, folder: Path, fmt: str) -> None:
    """Give the graph the folder's register tokens (zero unless they were trained) or attention constants."""
    import torch
    from safetensors import safe_open

    from regsurgery.runtime.surgery import repeated_registers

    if not surgery.plan.num_added:
        return
    added = surgery.graph_module.get_parameter(surgery.added_name)
    grows = not surgery.plan.constant_blocks
    with torch.no_grad():
        if fmt not in LIBRARIES:
            value = backend_of(fmt).state(folder)[surgery.added_name]
            added.copy_(repeated_registers(value, surgery.plan.num_registers) if grows else value)
            return
        for path in weight_files(folder, WEIGHTS_NAMES[fmt]):
            with safe_open(path, framework="pt") as file:
                for name in surgery.new_tensors().keys() & set(file.keys()):
                    value = file.get_tensor(name)
                    added.copy_(repeated_registers(value, surgery.plan.num_registers) if grows else value)


def size_of_program(patched: PatchedFolder, wanted: int | None) -> int | None:
    """The side of the square images that a program takes; None for other formats, which take the model's own size.

    Raises:
        UserError: `wanted` is given and differs.
    """
    size = patched.config.get("image_size")
    square = isinstance(size, list) and len(size) == 2 and size[0] == size[1] and type(size[0]) is int
    side: int | None = size[0] if square else None  # type: ignore[index]
    if wanted not in (None, side):
        raise UserError(
            f"--image-size {wanted}: {patched.root} holds a program (format {patched.format}), which takes only images "
            f"of {size} (height, width); leave out --image-size"
        )
    return side
