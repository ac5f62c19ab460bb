"""A weights file and an architecture -> a checkpoint folder of its library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from regsurgery.checkpoints.containers import Weights, WeightsFile, prefixes, read_weights_file
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.sums import combined_digest, sha256_each
from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.errors import CheckpointError, UserError, in_short
from regsurgery.frontends.bounds import bounded_model, check_numbers
from regsurgery.frontends.config import read_config
from regsurgery.frontends.conversion.arch import Arch, arch_of
from regsurgery.frontends.conversion.tensors import shapes_of
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.loaded import Converted
from regsurgery.frontends.model_id import config_folder
from regsurgery.options import LoadOptions

if TYPE_CHECKING:
    from torch import Tensor

    from regsurgery.frontends.conversion.target import Target

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Scratch:
    """A checkpoint folder made of what is none; `home` keeps it alive."""

    folder: Path
    library: str
    converted: Converted
    home: OwnedFolder


def convert_file(path: Path, options: LoadOptions, arch: Arch | None = None) -> Scratch:
    """The weights file `path` as a checkpoint folder, by the rules of the library of its architecture.

    Args:
        arch: the architecture, if it is known.

    Raises:
        CheckpointError: the file is broken or refused, does not say its architecture, or does not fit it.
        ModelNotFoundError: the library does not know the architecture.
        UserError: an option does not go with this file.
    """
    file = read_weights_file(path, options.allow_pickle)
    arch = arch or arch_of(file, options.arch)
    if arch.library == "transformers" and arch.folder is None:
        arch = Arch(arch.library, str(config_folder(arch.name, options)), arch.said_by)
    if arch.folder is not None:
        read_config(arch.folder, arch.library)  # refuses a folder without one
    weights = file.weights(options.ema, arch.library)
    check_numbers(path, dict(file.arguments))
    with scratch_folder() as home:
        folder = home.path / "converted"
        folder.mkdir()
        with bounded_model(path, [shapes_of(path, weights.tensors)]), _described(path, arch):
            target = target_of(arch, file, options)
            prefix, taken = fitted(target, weights, arch, options.prefix)
            target.write(folder)
    notes = tuple(_notes(arch, weights, prefix, taken))
    for note in notes:
        options.progress.say(f"{path.name}: {note}")
    return Scratch(folder, arch.library, Converted(path, digest(file.parts), notes), home)


@contextmanager
def _described(path: Path, arch: Arch) -> Iterator[None]:
    """What the library raises on the description of a model in `path` becomes a `CheckpointError`.

    Errors of the disk, where the result is written, are not among it.
    """
    unloadable = tuple(kind for kind in frontend(arch.library).UNLOADABLE if kind not in (OSError, SafetensorError))
    try:
        yield
    except unloadable as error:
        reason = in_short(error)
        raise CheckpointError(
            f"{path}: {arch.library} cannot make {arch}, as {arch.said_by} says it ({reason}); {arch.remedy}"
        ) from error


def target_of(arch: Arch, file: WeightsFile, options: LoadOptions) -> Target:
    """The model of `arch` that takes the tensors of `file`."""
    if arch.library == "timm":
        from regsurgery.frontends.conversion.timm import TimmTarget

        return TimmTarget(arch, file.arguments if arch.said_by == "the file" else {})
    if arch.library == "transformers":
        from regsurgery.frontends.conversion.transformers import TransformersTarget

        return TransformersTarget(arch, options)
    from regsurgery.frontends.conversion.open_clip import OpenAITarget, OpenClipTarget

    return OpenAITarget() if file.torchscript else OpenClipTarget(arch)


def fitted(target: Target, weights: Weights, arch: Arch, given: str | None) -> tuple[str, Mapping[str, Tensor]]:
    """The prefix in front of the model's names in the file, and the tensors that have it; `target` has taken them.

    Args:
        given: the prefix that the user says.

    Raises:
        CheckpointError: the tensors do not fit the architecture, whatever the prefix.
        UserError: no name has the prefix `given`, or several prefixes lead to a model each.
    """
    found: dict[str, Mapping[str, Tensor]] = {}
    problems: dict[str, str] = {}
    candidates = prefixes(list(weights.tensors), target.size() // 2) if given is None else [f"{given.rstrip('.')}."]
    for prefix in candidates:
        if any(prefix.startswith(other) for other in found):
            continue
        inside = {name[len(prefix) :]: value for name, value in weights.tensors.items() if name.startswith(prefix)}
        if given is not None and not inside:
            begin = ", ".join(sorted({f"{name.partition('.')[0]}." for name in weights.tensors})[:SHOWN])
            raise UserError(f"--prefix {given}: no tensor of {weights.path} has it; their names begin with {begin}")
        problem = target.take(inside)
        if problem is None:
            found[prefix] = inside
        else:
            problems[prefix] = problem
    if not found:
        problem = next(iter(problems.values()), "it has too few tensors")
        raise CheckpointError(f"{weights.path}: its tensors are not those of {arch}: {problem[:300]}; {arch.remedy}")
    if len(found) > 1:
        raise UserError(
            f"{weights.path}: holds several models, under {' and '.join(sorted(found))}; choose one with --prefix"
        )
    prefix, inside = next(iter(found.items()))
    if prefix != candidates[-1]:
        target.take(inside)  # again: a prefix that does not fit may have left some of its tensors behind
    return prefix, inside


def is_renamed(library: str, folder: Path, names: Sequence[str]) -> bool:
    """Whether tensors in the safetensors of a checkpoint folder have names that only its library's loader knows.

    What is patched is loaded by name, so such a folder is converted first.
    """
    if library == "open_clip":
        return names[:1] != [] and names[0].startswith("module")  # what open_clip's loader looks at
    if library == "timm":
        from regsurgery.frontends.conversion.timm import is_renamed as renamed_by_timm

        return renamed_by_timm(folder, names)
    return False  # transformers says what names on disk are called in memory, and the other way round


def digest(parts: tuple[Path, ...]) -> str:
    """The sha256 of a file; of the files' digests if there are several."""
    return combined_digest(sha256_each(parts))


def _notes(arch: Arch, weights: Weights, prefix: str, taken: Mapping[str, Tensor]) -> list[str]:
    """What was read of the file, and what was not."""
    said = arch.folder.name if arch.folder is not None else arch.name or "that it is a CLIP of OpenAI"
    notes = [f"read as {arch.library} ({arch.said_by} says {said})"]
    kind = {None: "", True: ", the averaged ones (EMA)", False: ", the trained ones, not the averaged (EMA)"}
    if weights.entry:
        notes.append(f"weights under '{weights.entry}'{kind[weights.averaged]}")
    if prefix:
        notes.append(f"names without the prefix '{prefix}'")
    others = [name for name in weights.tensors if not name.startswith(prefix)]
    if others:
        shown = ", ".join(sorted(others)[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        notes.append(f"{len(others)} other tensors left out ({shown})")
    return notes
