"""`--arch LIBRARY:NAME`: the architecture of a weights file that does not say it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from regsurgery.checkpoints.containers import WeightsFile
from regsurgery.checkpoints.limits import name_too_long
from regsurgery.errors import CheckpointError, UserError, did_you_mean
from regsurgery.formats import LIBRARIES
from regsurgery.frontends.config import CONFIG_NAMES, read_config

EXAMPLES = "timm:NAME, transformers:CONFIG_DIR_OR_ID or open_clip:ARCH"


@dataclass(frozen=True)
class Arch:
    """A library, and what it calls the architecture: a name, or a folder with its config.

    Attributes:
        said_by: where it comes from: the option, the file, or the folder that the file is in.
    """

    library: str
    name: str
    said_by: str = "--arch"

    @property
    def folder(self) -> Path | None:
        """The folder with the config, if `name` is one."""
        return Path(self.name) if self.name and Path(self.name).is_dir() else None

    @property
    def remedy(self) -> str:
        """What to do if the architecture is not that of a file, for a message."""
        if self.said_by == "--arch":
            return "give the --arch that it was trained with"
        if self.said_by == "the file":
            return "give the right one with --arch"
        return f"correct {self.said_by}, or give the weights file as MODEL, with --arch"

    def __str__(self) -> str:
        return f"{self.library}:{self.name}" if self.name else "a CLIP of OpenAI"


def parse_arch(text: str) -> Arch:
    """The architecture that the user names.

    Raises:
        UserError: it is not `LIBRARY:NAME`.
    """
    library, colon, name = text.partition(":")
    if not colon or not name or library not in LIBRARIES:
        hint = did_you_mean(library, list(LIBRARIES)) if colon else ""
        raise UserError(f"--arch {text[:300]}: must be {EXAMPLES}{hint}")
    if (longest := name_too_long(Path(name))) is not None:
        raise UserError(f"--arch {text[:100]}...: has a name of {longest} bytes in it; must be {EXAMPLES}")
    return Arch(library, name)


def arch_of(file: WeightsFile, given: str | None) -> Arch:
    """The architecture of a weights file: the one given, that which the file names, or of the config next to it.

    Raises:
        CheckpointError: nothing says it.
        UserError: `given` is not an architecture.
    """
    if given is not None:
        return parse_arch(given)
    named = file.facts.get("arch")
    if isinstance(named, str) and "args" in file.facts and _timm_has(named):
        return Arch("timm", named, "the file")
    if file.torchscript:
        return Arch("open_clip", "", "the file")
    beside = file.path.parent
    if any((beside / name).is_file() for name in CONFIG_NAMES):
        library, _, _ = read_config(beside)
        return Arch(library, str(beside.absolute()), "the config next to it")
    raise CheckpointError(
        f"{file.path}: does not say its architecture, and has no config next to it; add --arch {EXAMPLES}"
    )


def _timm_has(name: str) -> bool:
    import timm

    return timm.is_model(name)
