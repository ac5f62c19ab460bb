"""onnxruntime-web from the npm registry: the files of it that the live page runs.

One version is pinned, with the integrity that the registry gives for it; the archive is kept in the user's cache. No
npm is needed, and nothing of the archive runs here. There is no build without threads any more: the one for threads
runs with one.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import re
import tarfile
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING

from regsurgery.checkpoints.whole import replace_file
from regsurgery.errors import OutputError, UserError, in_short

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
MAX_BYTES = 128 << 20  # of an answer; the archive has 32 MiB


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
    if cached is not None and (kept := _kept(cached)) is not None:
        return _files(kept, str(cached))
    url = f"{registry().rstrip('/')}/{NAME}/-/{NAME}-{VERSION}.tgz"
    content = _checked(_fetched(url, progress), shown(url))
    if cached is not None:
        try:
            replace_file(cached, content)
        except OutputError as error:
            progress.say(f"{NAME} is not kept for the next time: {error}")
    return _files(content, shown(url))


def registry() -> str:
    """The npm registry: as npm has it from its environment variable or the user's `.npmrc`."""
    given = os.environ.get("npm_config_registry") or os.environ.get("NPM_CONFIG_REGISTRY")  # noqa: SIM112 # npm's own
    if given:
        return given
    try:
        lines = (Path.home() / ".npmrc").read_text("utf-8", "replace").splitlines()
    except (OSError, RuntimeError):  # there is none, or no home
        return REGISTRY
    settings = [(key.strip(), value.strip().strip("\"'")) for key, _, value in (line.partition("=") for line in lines)]
    return next((value for key, value in reversed(settings) if key == "registry" and value), REGISTRY)


def shown(url: str) -> str:
    """An address without the name and the password that may stand in it."""
    return re.sub(r"(?<=://)[^/]*@", "", url)


def _kept(cached: Path) -> bytes | None:
    """The archive in the cache; None if it is not there whole, after which it is fetched."""
    try:
        content = cached.read_bytes()
    except OSError:
        return None
    return content if _sum(content) == INTEGRITY else None


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
        raise UserError(
            f"--live: {NAME} is not in the cache, or not whole, and HF_HUB_OFFLINE is set; unset it, or {OTHERWISE}"
        )
    if not url.startswith(("https://", "http://")):
        raise UserError(
            f"--live: {shown(url)}: npm's registry must be an https or http address; correct it, or {OTHERWISE}"
        )
    parts, size = [], 0
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:  # nosec B310 # of the two kinds above
            progress.stage(f"fetch {NAME}", int(answer.headers["Content-Length"] or 0) or None, in_bytes=True)
            while piece := answer.read(PIECE):
                size += len(piece)
                if size > MAX_BYTES:
                    raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
                parts.append(piece)
                progress.advance(len(piece))
    # urllib's own are OSErrors; HTTPException: no answer in HTTP, or an address with a password; ValueError: no length
    except (OSError, http.client.HTTPException, ValueError) as error:
        where, why = shown(url), "not an address that can be fetched"
        why = why if isinstance(error, http.client.InvalidURL) else in_short(error)
        raise UserError(f"--live: {where}: cannot be fetched ({why}); try again, or {OTHERWISE}") from error
    return b"".join(parts)


def _checked(archive: bytes, where: str) -> bytes:
    found = _sum(archive)
    if found != INTEGRITY:
        raise UserError(
            f"{where}: is not {NAME} {VERSION} whole ({len(archive)} bytes of integrity {found[:20]}…, not "
            f"{INTEGRITY[:20]}…); {OTHERWISE}"
        )
    return archive


def _sum(archive: bytes) -> str:
    kind = INTEGRITY.partition("-")[0]
    return f"{kind}-{base64.b64encode(hashlib.new(kind, archive).digest()).decode('ascii')}"


def _files(archive: bytes, where: str) -> dict[str, bytes]:
    """`FILES` of an archive whose integrity was checked."""
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
            members = {name: opened.extractfile(f"package/dist/{name}") for name in FILES}
            return {name: member.read() for name, member in members.items() if member is not None}
    except (tarfile.TarError, KeyError) as error:
        raise UserError(f"{where}: has no {' and '.join(FILES)} ({in_short(error)}); {OTHERWISE}") from error
