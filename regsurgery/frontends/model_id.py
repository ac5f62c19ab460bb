"""Hub ids and URLs, `timm:NAME` and `open_clip:ARCH/TAG` -> the folder that the Hub client downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from regsurgery.checkpoints.download import snapshot
from regsurgery.errors import ModelNotFoundError, UserError, did_you_mean
from regsurgery.options import LoadOptions

DEMO = "demo"
HUB_HOSTS = ("huggingface.co", "hf.co")
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "hf://")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
LIBRARY_PREFIXES = ("timm", "open_clip")
CONFIGS = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")
PICKLES = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class HubPlace:
    """A repository on the Hub, and what an id or URL says besides: a revision, a folder inside."""

    repo: str
    revision: str | None = None
    subfolder: str | None = None


def library_of(model_id: str) -> str | None:
    """The library that the prefix of `timm:NAME` or `open_clip:ARCH/TAG` names."""
    prefix = model_id.partition(":")[0]
    return prefix if prefix in LIBRARY_PREFIXES else None


def repository_of(model_id: str) -> str:
    """The Hub repository of a Hub id or URL, `timm:NAME` or `open_clip:ARCH/TAG`."""
    return hub_place(model_id).repo


def hub_place(model_id: str) -> HubPlace:
    """The place on the Hub of a Hub id or URL, `timm:NAME` or `open_clip:ARCH/TAG`.

    Raises:
        ModelNotFoundError: the library has no such model, or the text is empty, or a URL that does not name one.
    """
    prefix, _, name = model_id.partition(":")
    if prefix == "timm":
        return HubPlace(_timm_repo(name))
    if prefix == "open_clip":
        return HubPlace(_open_clip_repo(name))
    if not model_id.strip():
        raise ModelNotFoundError("MODEL is empty; give a folder, a Hub id, timm:NAME, open_clip:ARCH/TAG or demo")
    for hub in HUB_PREFIXES:
        if model_id.startswith(hub):
            return _with_revision(model_id.removeprefix(hub))
    if model_id.startswith(("https://", "http://")):
        return _of_url(model_id)
    return _with_revision(model_id)


def _with_revision(name: str) -> HubPlace:
    repo, _, revision = name.partition("@")
    return HubPlace(repo, revision or None)


def _of_url(url: str) -> HubPlace:
    """The place that a URL of the Hub names."""
    from huggingface_hub import constants

    parts = urlsplit(url)
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.netloc not in (*HUB_HOSTS, urlsplit(constants.ENDPOINT).netloc) or len(path) < 2:
        raise ModelNotFoundError(
            f"{url}: not a model on the Hugging Face Hub; download the file, and give its path with --arch"
        )
    repo, kind, rest = "/".join(path[:2]), path[2] if len(path) > 2 else "tree", path[3:]
    if kind != "tree":
        raise ModelNotFoundError(
            f"{url}: is one file of {repo}; give the repository, or download the file (hf download {repo} "
            f"{'/'.join(rest[1:]) or 'FILE'}) and give its path"
        )
    return HubPlace(repo, rest[0] if rest else None, "/".join(rest[1:]) or None)


def _timm_repo(name: str) -> str:
    import timm

    known = timm.is_model(name.partition(".")[0]) and (name in timm.list_pretrained() or "." not in name)
    cfg = timm.models.get_pretrained_cfg(name, allow_unregistered=False) if known else None
    if cfg is None:
        base, _, tag = name.partition(".")
        tags = [full for full in timm.list_pretrained() if tag and full.startswith(f"{base}.")]
        bases = sorted({full.partition(".")[0] for full in timm.list_pretrained()})
        hint = did_you_mean(name, tags) if tags else did_you_mean(base, bases)
        raise ModelNotFoundError(
            f"timm:{name}: timm has no pretrained model of that name"
            f"{hint or '; timm.list_pretrained() in Python lists them'}"
        )
    if not cfg.hf_hub_id:
        raise ModelNotFoundError(f"timm:{name}: timm names no Hub repository for it; give a folder or a Hub id")
    return f"timm/{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id


def _open_clip_repo(name: str) -> str:
    import open_clip

    architecture, _, tag = name.partition("/")
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not cfg:
        known = [f"{arch}/{t}" for arch, t in open_clip.list_pretrained()]
        raise ModelNotFoundError(f"open_clip:{name}: open_clip has no such model and tag{did_you_mean(name, known)}")
    if not cfg.get("hf_hub"):
        raise ModelNotFoundError(
            f"open_clip:{name}: open_clip names no Hub repository for it; give a folder or a Hub id"
        )
    return cfg["hf_hub"].rstrip("/")


def revision_of(place: HubPlace, model_id: str, options: LoadOptions) -> str | None:
    """The revision to download.

    Raises:
        UserError: MODEL names one, and `--revision` another.
    """
    if place.revision is not None and options.revision not in (None, place.revision):
        raise UserError(f"--revision {options.revision}: {model_id} names another revision; give one of them")
    return place.revision or options.revision


def downloaded(
    place: HubPlace, model_id: str, revision: str | None, subfolder: str | None, *, pickles: bool
) -> tuple[Path, str]:
    """The repository's files for one checkpoint: at its top, or in `subfolder`; and the commit.

    Of folders inside only the configs are fetched, for the message that says which of them to ask for.
    """
    weights = ["*.safetensors", *(PICKLES if pickles else ())]
    if subfolder is not None:
        return snapshot(place.repo, model_id, revision, [f"{subfolder}/{kind}" for kind in (*CONFIGS, *weights)])
    return snapshot(place.repo, model_id, revision, [*CONFIGS, *weights], [f"*/{kind}" for kind in weights])


def config_folder(name: str, options: LoadOptions) -> Path:
    """The folder with the config of `--arch transformers:NAME`, a Hub id; no weights are fetched.

    Raises:
        ModelNotFoundError: there is no such repository, or it cannot be reached.
    """
    place = hub_place(name)
    return snapshot(place.repo, f"--arch transformers:{name}", place.revision, CONFIGS, ["*/*"])[0]
