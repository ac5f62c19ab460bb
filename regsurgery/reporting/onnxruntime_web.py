"""onnxruntime-web from the npm registry: the files of it that the live page runs.

One version is pinned, with the integrity that the registry gives for it; the archive is kept in the user's cache. No
npm is needed. The single-threaded build would be a file of its own no longer: the one for threads runs without them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.whole import replace_file
from regsurgery.errors import UserError, in_short

if TYPE_CHECKING:
    from regsurgery.progress import Progress

NAME, VERSION = "onnxruntime-web", "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
SCRIPT, PROGRAM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"  # the script looks for the program beside it
FILES = (SCRIPT, PROGRAM)
REGISTRY = "https://registry.npmjs.org/"
OTHERWISE = f"get it elsewhere with `npm pack {NAME}@{VERSION}`, and give the file with --onnxruntime-web"
TIMEOUT = 60.0  # seconds without a byte
PIECE = 1 << 20  # bytes


def onnxruntime_web(given: str | Path | None, progress: Progress) -> dict[str, bytes]:
    """The content of `FILES`, by their names.

    Args:
        given: the package's archive, as `npm pack` writes it; by default it is taken from the cache, or fetched from
            the registry that npm is configured for (`npm_config_registry`, or `registry` in `~/.npmrc`).

    Raises:
        UserError: it cannot be had, or is not the version that is pinned.
    """
    if given is not None:
        return _files(_checked(_read(Path(given)), str(given)), str(given))
    cached = _cached()
    if cached is not None and cached.is_file():
        return _files(_checked(cached.read_bytes(), str(cached), "remove it"), str(cached))
    url = f"{registry().rstrip('/')}/{NAME}/-/{NAME}-{VERSION}.tgz"
    content = _checked(_fetched(url, progress), url)
    if cached is not None:
        replace_file(cached, content)
    return _files(content, url)


def registry() -> str:
    """The npm registry: as npm has it from its environment variable or the user's `.npmrc`."""
    given = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")  # noqa: SIM112 # npm's own
    if given:
        return given
    config = Path.home() / ".npmrc"
    lines = config.read_text("utf-8", "replace").splitlines() if config.is_file() else []
    settings = [(key.strip(), value.strip().strip("\"'")) for key, _, value in (line.partition("=") for line in lines)]
    return next((value for key, value in reversed(settings) if key == "registry" and value), REGISTRY)


def _cached() -> Path | None:
    """Where the archive is kept; None where the Hub's client can keep nothing, as in a home that is read-only."""
    from huggingface_hub import cached_assets_path

    try:
        folder = cached_assets_path("regsurgery", "npm")
    except (OSError, ValueError):
        return None
    return folder / f"{NAME}-{VERSION}.tgz" if os.access(folder, os.W_OK) else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(
            f"--onnxruntime-web {path}: cannot be read ({error.strerror}); give the file that `npm pack "
            f"{NAME}@{VERSION}` writes"
        ) from error


def _fetched(url: str, progress: Progress) -> bytes:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise UserError(f"--live: {NAME} is not in the cache, and HF_HUB_OFFLINE is set; unset it, or {OTHERWISE}")
    if not url.startswith(("https://", "http://")):
        raise UserError(f"--live: {url}: npm's registry must be an https or http address; correct it, or {OTHERWISE}")
    parts = []
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # nosec B310 # of the two kinds above
            progress.stage(f"fetch {NAME}", int(answer.headers["Content-Length"] or 0) or None, in_bytes=True)
            while piece := answer.read(PIECE):
                parts.append(piece)
                progress.advance(len(piece))
    except (OSError, ValueError) as error:  # urllib's own are OSErrors; ValueError: no address, no length
        raise UserError(f"--live: {url}: cannot be fetched ({in_short(error)}); try again, or {OTHERWISE}") from error
    return b"".join(parts)


def _checked(archive: bytes, where: str, mend: str = "") -> bytes:
    kind, _, wanted = INTEGRITY.partition("-")
    found = base64.b64encode(hashlib.new(kind, archive).digest()).decode("ascii")
    if found != wanted:
        raise UserError(
            f"{where}: is not {NAME} {VERSION} (its {kind} is {found[:12]}…, not {wanted[:12]}…); "
            f"{mend + ', or ' if mend else ''}{OTHERWISE}"
        )
    return archive


def _files(archive: bytes, where: str) -> dict[str, bytes]:
    """`FILES` of an archive whose integrity was checked."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
            members = {name: opened.extractfile(f"package/dist/{name}") for name in FILES}
            return {name: member.read() for name, member in members.items() if member is not None}
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{where}: has no {' and '.join(FILES)} ({in_short(error)}); {OTHERWISE}") from error
