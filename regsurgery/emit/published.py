"""A patched folder as pushed to the Hub: files that name a place on this machine name the repository instead.

Everything else is pushed byte for byte, and SHA256SUMS matches what is pushed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.sums import SUMS_NAME, read_sums
from regsurgery.emit.run_record import RUN_RECORD_NAME, read_run_record
from regsurgery.emit.source_card import CARD_NAME
from regsurgery.formats import PROGRAM_CONFIG
from regsurgery.frontends.config import CONFIG_NAMES
from regsurgery.frontends.model_id import DEMO
from regsurgery.recipe import RECIPE_NAME

PYTHON_BLOCK = re.compile(r"(?<=^```python\n).*?(?=^```$)", re.MULTILINE | re.DOTALL)
ABOUT_THE_PATH = re.compile(r"^`([\w.-]+)` stands for the path of this folder .*\n\n", re.MULTILINE)
DOWNLOAD = "from huggingface_hub import snapshot_download\n\nfolder = snapshot_download({arguments})\n"


@dataclass(frozen=True)
class Published:
    """What goes to the Hub.

    Attributes:
        files: name -> the file of the folder, or the bytes that take its place.
        digests: name -> sha256 of all files but SHA256SUMS.
        paths: absolute paths on this machine -> what is published instead.
    """

    files: dict[str, Path | bytes]
    digests: dict[str, str]
    paths: dict[str, str]

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> bytes."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


def published(folder: Path, repo: str, revision: str | None = None) -> Published:
    """The files of `folder`, whose SHA256SUMS have been checked, for the branch `revision` of `repo`.

    Files that SHA256SUMS does not list are not published. Of paths on this machine (the source, the images), only the
    last component is published. The result depends only on the arguments and the folder's content.
    """
    digests = read_sums(folder)
    files: dict[str, Path | bytes] = {name: folder / name for name in digests}
    paths = {path: _last_part(path) for path in sorted(_local_paths(folder), key=len, reverse=True)}
    rewritten = {*CONFIG_NAMES, PROGRAM_CONFIG, RECIPE_NAME, RUN_RECORD_NAME, CARD_NAME}
    for name in sorted(rewritten & digests.keys()):
        text = before = (folder / name).read_text("utf-8")
        if name == "open_clip_config.json":
            text = _named_after(text, repo, revision)
        if name == CARD_NAME:
            text = _card(text, repo, revision)
        for path, shown in paths.items():
            text = re.sub(re.escape(path) + r"/?(?![\w/-]|\.\w)", lambda _, shown=shown: shown, text)
        if text != before:
            files[name] = text.encode()
            digests[name] = hashlib.sha256(text.encode()).hexdigest()
    files[SUMS_NAME] = "".join(f"{digest}  {name}\n" for name, digest in digests.items()).encode()
    return Published(files, digests, paths)


def _local_paths(folder: Path) -> Iterator[str]:
    """Absolute paths in what regsurgery recorded: the source, and the arguments of the run."""
    from regsurgery.verification.patched import folder_format, read_patched_config

    source = read_patched_config(folder, folder_format(folder))["regsurgery"]["source"]["id"]
    texts = list(_texts([source, read_run_record(folder)["run"]]))
    for text in [*texts, *(text.partition(":")[2] for text in texts)]:  # LIBRARY:FOLDER names a folder too
        if Path(text).is_absolute() and Path(text).name:
            yield text.rstrip("/")


def _last_part(path: str) -> str:
    """The published part of an absolute path; never the name of the demo, which is another model."""
    name = Path(path).name
    return f"./{name}" if name == DEMO else name


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _named_after(text: str, repo: str, revision: str | None) -> str:
    """An open_clip config that loads its timm tower from the repository, if that is in the folder (native mode)."""
    vision = json.loads(text).get("model_cfg", {}).get("vision_cfg", {})
    name = vision.get("timm_model_name") if isinstance(vision, dict) else None
    if not isinstance(name, str) or not name.startswith("local-dir:"):
        return text
    there = f"hf-hub:{repo}" + (f"@{revision}" if revision else "")
    return text.replace(json.dumps(name, ensure_ascii=False), json.dumps(there))


def _card(text: str, repo: str, revision: str | None) -> str:
    """A model card whose snippets and commands load the model from the Hub."""
    about = ABOUT_THE_PATH.search(text)
    if about is None:  # somebody wrote another one
        return text
    here = re.escape(about[1])
    text = PYTHON_BLOCK.sub(lambda block: _snippet(block.group(), here, repo, revision), text)
    text = re.sub(rf"(?<=regsurgery )(reproduce|verify) {here}(?=[\s`])", rf"\1 {repo}", text)
    return ABOUT_THE_PATH.sub("", text)


def _snippet(code: str, here: str, repo: str, revision: str | None) -> str:
    """`code`, changed to load `repo` instead of the folder, for whose path `here` stands (a pattern)."""
    quoted = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    code = re.sub(rf'(from_pretrained|regsurgery\.load)\("{here}"', lambda call: f"{call[1]}({quoted}", code)
    code = re.sub(rf'"local-dir:{here}"', f'"hf-hub:{repo}{"@" + revision if revision else ""}"', code)
    local = re.sub(rf'"{here}/([^"]+)"', r'f"{folder}/\1"', re.sub(rf'"{here}"', "folder", code))
    return code if local == code else DOWNLOAD.format(arguments=quoted) + local
