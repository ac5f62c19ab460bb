"""`unpatch`: a patched folder -> the checkpoint that was patched, byte for byte, or why that is impossible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.sums import read_sums, sha256
from regsurgery.checkpoints.watched import Watched
from regsurgery.checkpoints.whole import check_output, whole_folder
from regsurgery.errors import CheckpointError, UserError
from regsurgery.formats import PROGRAMS
from regsurgery.modes import MODES
from regsurgery.verification.original import read_record, restore_original
from regsurgery.verification.patched import existing_folder, folder_format, read_patched_config

if TYPE_CHECKING:
    from regsurgery.progress import Progress


@dataclass(frozen=True)
class Restored:
    """What `unpatch` wrote.

    Attributes:
        source: what was patched, as recorded in the patched folder's config: `id`, `revision`, `sha256`.
        files: name -> sha256, identical for the source and the output.
        not_copied: further weight files of the source (another format, another precision), which the patched folder
            never had.
        changed: files of the patched folder that differ from its SHA256SUMS (after training, for example). None of
            these changes is in `files`.
    """

    output: str
    source: Mapping[str, Any]
    files: Mapping[str, str]
    not_copied: tuple[str, ...]
    changed: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for `--json`: `output`, `source` (`id`, `revision`, `sha256`), `files` (name -> sha256),
        `not_copied` and `changed` (lists of names).
        """
        return asdict(self)


def unpatch(folder: str | Path, output: str | Path, *, progress: Progress | None = None) -> Restored:
    """Write to the new folder `output` the checkpoint that was patched: the same bytes in every file.

    Every file is checked against the sha256 that was recorded while patching; `output` is complete or absent. Modes
    `shift` and `bias` keep all of the source's tensors, in the library's own format.

    Raises:
        UserError: the original is not in the folder (native mode, `.pt2`, a source that was converted); the message
            says where the source is and how to fetch it.
        CheckpointError: the folder is broken, changes meanwhile, or the original's tensors were trained on.
    """
    root = existing_folder(folder)
    files = Watched.folder(root)
    with files.blamed():
        return _restored(root, output, files, progress)


def _restored(root: Path, output: str | Path, watched: Watched, progress: Progress | None) -> Restored:
    fmt, target = folder_format(root), Path(output)
    block = read_patched_config(root, fmt)["regsurgery"]
    source = block["source"]
    check_output(target)
    if MODES[block["mode"]].stock:
        raise UserError(
            f"{root}: native mode changes weights, so the original's are not here; {where_to_fetch(source)}"
        )
    if fmt in PROGRAMS:
        raise UserError(f"{root}: a .{fmt} is a program, without the files it was made from; {where_to_fetch(source)}")
    try:
        converted = read_record(root).converted_from
        if converted is not None:
            raise CheckpointError(
                f"{root}: the source's weights were converted from {converted['name']} (sha256 {converted['sha256']}), "
                "whose own bytes are not here"
            )
        with whole_folder(target) as partial:
            record = restore_original(root, partial, fmt, progress)
            files = {file.name: file.sha256 for file in record.files}
            changed = _changed(root, files)
            watched.check()
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {where_to_fetch(source)}") from error
    return Restored(str(output), source, files, record.not_copied, changed)


def _changed(root: Path, restored: Mapping[str, str]) -> tuple[str, ...]:
    """The files of `root` that differ from its SHA256SUMS; files already known to be unchanged are not read again."""
    sums = read_sums(root)
    return tuple(
        name
        for name, digest in sums.items()
        if restored.get(name) != digest and not ((root / name).is_file() and sha256(root / name) == digest)
    )


def where_to_fetch(source: Mapping[str, Any]) -> str:
    """Where the source of a patched folder is, and the command that fetches it."""
    name, weights = source["id"], f"weights sha256 {source['sha256']}"
    if name == "demo":
        return "the source is the embedded demo, which every run of regsurgery generates"
    if source.get("revision") is None:
        file = source.get("file")
        kind = "file" if isinstance(file, dict) and file.get("name") == Path(name).name else "folder"
        return f"the source was the {kind} {name} ({weights})"
    repo = source.get("repo", name)
    return (
        f"the source is {name}, revision {source['revision']} ({weights}): "
        f"hf download {repo} --revision {source['revision']} --local-dir original"
    )
