"""A report and its live page as a static Space, beside the model that they are about.

The Space names the model in its metadata, by which the Hub shows each on the page of the other. The model's card does
not change: `reproduce` compares it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from regsurgery.checkpoints.sums import SUMS_NAME, sha256
from regsurgery.errors import UserError
from regsurgery.options import PushOptions
from regsurgery.plain import line, markdown
from regsurgery.version import __version__

SPACE_RECORD = "regsurgery_space.json"  # says that regsurgery wrote a Space
REPORT, LIVE = "index.html", "live"  # their names in a Space


@dataclass(frozen=True)
class Space:
    """What a Space is to hold.

    Attributes:
        repo: its USER/NAME.
        files: name -> its file, or its bytes.
    """

    repo: str
    files: dict[str, Path | bytes]

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def space_of(folder: Path, repo: str, options: PushOptions) -> Space:
    """The Space of a patched folder that is pushed to `repo`.

    Raises:
        UserError: there is no report, or it is another folder's, or one of an earlier state of this one, or a file of
            its live page is missing.
    """
    from regsurgery.reporting.live import LIVE_FILES, PAGE, live_folder
    from regsurgery.reporting.report import default_report

    path = Path(options.report) if options.report is not None else default_report(folder)
    again = f"make it with `regsurgery report {folder} --live -o {path} --images PHOTOS`"
    text = _text(path, again)
    if f'<meta name="regsurgery-folder" content="{sha256(folder / SUMS_NAME)}">' not in text:
        raise UserError(f"{path}: is not the report of {folder} as it is now; {again}, or name another with --report")
    files: dict[str, Path | bytes] = {}
    beside = live_folder(path)
    link = f'href="{quote(beside.name)}/{PAGE}"'
    if link in text:
        text = text.replace(link, f'href="{LIVE}/{PAGE}"')
        page = _text(beside / PAGE, again).replace(f'href="../{quote(path.name)}"', f'href="../{REPORT}"')
        files = {f"{LIVE}/{name}": beside / name for name in LIVE_FILES} | {f"{LIVE}/{PAGE}": page.encode()}
    if missing := [str(file) for file in files.values() if isinstance(file, Path) and not file.is_file()]:
        raise UserError(f"{missing[0]}: no such file, which the live page needs; {again}")
    record = {"version": __version__, "model": repo, "folder": sha256(folder / SUMS_NAME)}
    files |= {
        REPORT: text.encode(),
        "README.md": _readme(repo, f"{LIVE}/{PAGE}" in files).encode(),
        SPACE_RECORD: (json.dumps(record, indent=2) + "\n").encode(),
    }
    digests = {
        name: sha256(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        for name, content in sorted(files.items())
    }
    files[SUMS_NAME] = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    return Space(options.space_name or f"{repo}-report", files)


def _text(path: Path, again: str) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"--space: {path}: cannot be read ({reason}); {again}") from error


def _readme(repo: str, live: bool) -> str:
    """The Space's metadata, and what is seen where its files are."""
    import yaml
    from huggingface_hub import constants

    name = line(repo.rpartition("/")[2])
    data = {
        "title": f"{name}, before and after",
        "emoji": "🩹",
        "colorFrom": "indigo",
        "colorTo": "yellow",
        "sdk": "static",
        "app_file": REPORT,
        "models": [repo],
        "tags": ["regsurgery", "test-time-registers"],
        "short_description": "Outlier tokens before and after surgery",
    }
    runs = " Both models run in the browser, on a photo of yours." if live else ""
    front = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    about = f"[{markdown(repo)}]({constants.ENDPOINT}/{repo})"
    return f"---\n{front}---\n\nThe report of {about}, written by regsurgery {__version__}.{runs}\n"
