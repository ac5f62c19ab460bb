"""Reading patched folders: their format, their config, their module and the tensors that were added."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.backends.formats import backend as backend_of
from regsurgery.checkpoints.limits import BROKEN, read_json, refuse_links_out
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import read_header
from regsurgery.checkpoints.sums import check_sums
from regsurgery.errors import CheckpointError, UserError
from regsurgery.formats import LIBRARIES, PROGRAM_CONFIG, PROGRAMS, WEIGHTS_NAMES
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

    Runs the folder's own loader file. A loader file from the Hub is run only if this regsurgery writes the same bytes.

    Args:
        folder: the folder, or USER/NAME on the Hub.
        revision: Hub revision.
        trust_remote_code: run any code in the repository.

    Raises:
        ModelNotFoundError: there is no such folder, and the repository does not exist or cannot be reached.
        CheckpointError: the files do not match SHA256SUMS, or the model cannot be built from them.
    """
    root = at_home(folder, revision, trust_remote_code=trust_remote_code)
    return reloaded(root, folder_format(root))


def at_home(folder: str | Path, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """`folder`, or the download of the Hub repository of that name; see `load`."""
    if isinstance(folder, Path) or Path(folder).is_dir() or not HUB_ID.fullmatch(folder):
        return existing_folder(folder)
    from regsurgery.checkpoints.download import snapshot

    root = existing_folder(snapshot(folder, folder, revision)[0])
    check_sums(root, "remove it from the Hub's cache (hf cache rm) and load it again")
    if not trust_remote_code:
        _refuse_foreign_code(root, folder)
    return root


def _refuse_foreign_code(root: Path, repo: str) -> None:
    """Raise `CheckpointError` for code from the Hub that differs from what this regsurgery writes."""
    fmt = folder_format(root)
    foreign = backend_of(fmt, patched_mode(root, fmt)).foreign_code(root)
    if foreign is not None:
        raise CheckpointError(
            f"{repo}: its {foreign} is not what this regsurgery writes, so loading it would run unknown code; read it "
            "and load with trust_remote_code=True (--trust-remote-code), or patch the source yourself"
        )


def rebuilt(
    folder: Path, config: dict[str, Any], fmt: str, *, stored: bool, image_size: tuple[int, int] | None = None
) -> nn.Module:
    """The patched model of a folder, as a user would get it.

    Args:
        stored: keep its weights on disk if possible.
        image_size: for images of this size (height, width), if it is not the model's own; a program has one size.
    """
    backend = backend_of(fmt, MODES[config["regsurgery"]["mode"]])
    options: dict[str, Any] = {}
    if fmt in LIBRARIES:
        options = {**({"stored": True} if stored else {}), **({"image_size": image_size} if image_size else {})}
    return backend.reload(folder, config, **options)


def reloaded(folder: Path, fmt: str, *, stored: bool = False, image_size: tuple[int, int] | None = None) -> nn.Module:
    """The patched model of a folder that may be broken; `stored` and `image_size`: see `rebuilt`.

    Raises:
        CheckpointError: the folder's own loader file, or the stock host, cannot build it.
    """
    config = read_patched_config(folder, fmt)
    backend = backend_of(fmt, MODES[config["regsurgery"]["mode"]])
    name = WEIGHTS_NAMES.get(fmt)
    headers = [read_header(path) for path in weight_files(folder, name)] if name else []
    unloadable = frontend(fmt).UNLOADABLE if fmt in LIBRARIES else BROKEN
    try:
        if not headers:
            return rebuilt(folder, config, fmt, stored=stored, image_size=image_size)
        with bounded_model(folder / backend.CONFIG_NAME, headers):
            return rebuilt(folder, config, fmt, stored=stored, image_size=image_size)
    except unloadable as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
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
        if fmt not in PROGRAMS:
            raise CheckpointError(f"{program}: its 'format' is not one of {', '.join(PROGRAMS)}; patch the model again")
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
    texts = [source.get(key) for key in ("id", "sha256")] if isinstance(source, dict) else [None]
    if (
        not isinstance(block, dict)
        or block.get("mode") not in tuple(MODES)
        or not all(isinstance(t, str) for t in texts)
        or not isinstance(block.get("tower"), str | None)
    ):
        raise CheckpointError(f"{path}: its 'regsurgery' entry is not one that regsurgery wrote; patch the model again")
    return config


@dataclass(frozen=True)
class PatchedFolder:
    """The metadata of a patched folder.

    Attributes:
        config: see `read_patched_config`.
    """

    root: Path
    format: str
    config: dict[str, Any]
    recipe: Recipe


def open_patched(root: Path) -> PatchedFolder:
    """The folder `root`, with its files checked.

    Raises:
        CheckpointError: files are missing, broken, or not those of SHA256SUMS.
        UserError: it is not a patched folder.
    """
    check_sums(root)
    fmt = folder_format(root)
    return PatchedFolder(root, fmt, read_patched_config(root, fmt), find_recipe(str(root / RECIPE_NAME)))


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
