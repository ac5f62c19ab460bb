"""MODEL -> a folder on this disk that holds a checkpoint in its library's layout, and what is known of its origin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from regsurgery.checkpoints.limits import name_too_long
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.errors import ModelNotFoundError, UserError
from regsurgery.frontends.conversion.adapters import Load, is_adapter, merge_adapter
from regsurgery.frontends.conversion.files import Scratch, convert_file
from regsurgery.frontends.hints import where_to_look
from regsurgery.frontends.loaded import Converted
from regsurgery.frontends.model_id import downloaded, library_of, place_of
from regsurgery.options import LoadOptions


@dataclass(frozen=True)
class Found:
    """Where a checkpoint is.

    Attributes:
        revision: the Hub commit; `repo`: the Hub repository.
        library: whose files to take, if that is not for the folder's config to say.
        converted: what the folder was made of, if it was; `home` then keeps it alive.
    """

    folder: Path
    revision: str | None = None
    repo: str | None = None
    library: str | None = None
    converted: Converted | None = None
    home: OwnedFolder | None = None


def find_checkpoint(model_id: str, options: LoadOptions, load: Load) -> Found:
    """The checkpoint that MODEL names.

    Args:
        load: loads the model that an adapter is for.

    Raises:
        ModelNotFoundError: nothing has this id, or it cannot be reached.
        CheckpointError: a weights file or an adapter cannot be read.
        UserError: an option does not go with MODEL.
    """
    if model_id and Path(model_id).is_file():
        _refuse_revision(model_id, options)
        if options.subfolder is not None:
            raise UserError(f"--subfolder {options.subfolder}: {model_id} is a file, not a folder; leave it out")
        return _made(convert_file(Path(model_id), options))
    if options.arch is not None or options.prefix is not None:
        here = "is a folder; give one of its files" if Path(model_id).is_dir() else "is no file here; check its path"
        raise UserError(f"--arch and --prefix are for a weights file, and {model_id} {here}, or leave them out")
    library, subfolder = options.library, options.subfolder
    if model_id and Path(model_id).is_dir():
        _refuse_revision(model_id, options)
        folder, revision, repo = Path(model_id), options.commit, None
    else:
        place, library = place_of(model_id, options), library or library_of(model_id)
        options.progress.stage("download")
        folder, revision = downloaded(place, model_id, library, pickles=options.allow_pickle)
        options.progress.stage("load")
        repo, subfolder = place.repo, place.subfolder
    if subfolder is not None:
        folder = _inside(folder, subfolder, model_id)
    if is_adapter(folder):
        return _made(merge_adapter(folder, options, load), revision, repo)
    return Found(folder, revision, repo, library)


def check_length(path: Path) -> None:
    """Raise `ModelNotFoundError` for a name that is longer than files and repositories can have."""
    longest = name_too_long(path)
    if longest is not None:
        raise ModelNotFoundError(
            f"{str(path)[:100]}...: has a name of {longest} bytes in it, more than files and models can have; check "
            "MODEL"
        )


def _made(scratch: Scratch, revision: str | None = None, repo: str | None = None) -> Found:
    return Found(scratch.folder, revision, repo, scratch.library, scratch.converted, scratch.home)


def _refuse_revision(path: str, options: LoadOptions) -> None:
    if options.revision is not None:
        raise UserError(
            f"--revision {options.revision}: is for repositories on the Hub, and {path} is here; leave it out"
        )


def _inside(folder: Path, name: str, model_id: str) -> Path:
    """The folder `name` inside `folder`.

    Raises:
        UserError: it is not there, or would be outside.
    """
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise UserError(f"--subfolder {name}: must be the name of a folder inside {model_id}, without '..'")
    inner = folder.joinpath(*parts)
    if not inner.is_dir():
        hint = where_to_look(folder) if folder.is_dir() else ""
        raise UserError(f"{model_id}: has no folder {name!r} inside{hint or '; check its name'}")
    return inner
