"""Hub ids and URLs, `timm:NAME` and `open_clip:ARCH/TAG` -> the folder that the Hub client downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote, urlsplit

from regsurgery.checkpoints.download import snapshot
from regsurgery.errors import ModelNotFoundError, UserError, did_you_mean
from regsurgery.options import LoadOptions

DEMO = "demo"
HUB_HOSTS = ("huggingface.co", "hf.co")
HUB_PREFIXES = ("hf-hub:", "hf_hub:", "hf://")
NO_MODELS = ("datasets", "spaces")  # what else URLs of the Hub begin with
LIBRARY_PREFIXES = ("timm", "open_clip")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
CONFIGS = ("*.json", "*.txt", "*.model", "README.md", "LICENSE*")
PICKLES = ("*.bin", "*.pt", "*.pth")
OF_OPEN_CLIP = ("open_clip_*.safetensors", "open_clip_*.bin")
# Library -> weights of others in the same repository.
OF_OTHERS = {"open_clip": ("model*.safetensors", "pytorch_model*.bin"), "timm": OF_OPEN_CLIP,
             "transformers": OF_OPEN_CLIP}  # fmt: skip


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
        ModelNotFoundError: the library has no such model, or the text names no repository.
    """
    prefix, _, name = model_id.partition(":")
    if prefix == "timm":
        return HubPlace(_timm_repo(name))
    if prefix == "open_clip":
        return HubPlace(_open_clip_repo(name))
    if not model_id.strip():
        raise ModelNotFoundError("MODEL is empty; give a folder, a Hub id, timm:NAME, open_clip:ARCH/TAG or demo")
    if model_id.startswith(("https://", "http://")):
        return _of_url(model_id)
    if model_id.startswith(tuple(f"{host}/" for host in HUB_HOSTS)):  # as browsers show it
        return _of_url(f"https://{model_id}")
    hub = next((hub for hub in HUB_PREFIXES if model_id.startswith(hub)), "")
    repo, _, revision = model_id.removeprefix(hub).partition("@")
    if hub and not REPOSITORY.fullmatch(repo):
        raise ModelNotFoundError(f"{model_id}: must be {hub}USER/NAME, or {hub}USER/NAME@REVISION")
    return HubPlace(repo, revision or None)


def place_of(model_id: str, options: LoadOptions) -> HubPlace:
    """The place on the Hub of MODEL and its options.

    Raises:
        ModelNotFoundError: as of `hub_place`.
        UserError: MODEL names a revision or a subfolder, and an option another.
    """
    place = hub_place(model_id)
    for name, own in (("revision", place.revision), ("subfolder", place.subfolder)):
        given = getattr(options, name)
        if own is not None and given not in (None, own):
            raise UserError(f"--{name} {given}: {model_id} names another {name}, {own}; give one of them")
    revision = options.commit or place.revision or options.revision
    return replace(place, revision=revision, subfolder=place.subfolder or options.subfolder)


def _of_url(url: str) -> HubPlace:
    """The place that a URL of the Hub names."""
    from huggingface_hub import constants

    try:
        parts = urlsplit(url)
    except ValueError as error:  # brackets of an IPv6 address that are not closed
        raise ModelNotFoundError(f"{url}: not a URL ({error}); give {HUB_HOSTS[0]}/USER/NAME") from error
    path = [unquote(part) for part in parts.path.split("/") if part]
    if parts.netloc not in (*HUB_HOSTS, urlsplit(constants.ENDPOINT).netloc):
        raise ModelNotFoundError(
            f"{url}: not on the Hugging Face Hub; download what is there, and give its path (of a weights file, with "
            "--arch)"
        )
    if len(path) < 2 or path[0] in NO_MODELS:
        raise ModelNotFoundError(f"{url}: not a model on the Hugging Face Hub; give {HUB_HOSTS[0]}/USER/NAME")
    repo, kind, rest = "/".join(path[:2]), path[2] if len(path) > 2 else "tree", path[3:]
    if kind in ("blob", "resolve", "raw") and len(rest) > 1:
        raise ModelNotFoundError(
            f"{url}: is one file of {repo}; give the repository, or download the file (hf download {repo} "
            f"{'/'.join(rest[1:])} --revision {rest[0]}) and give its path"
        )
    if kind not in ("tree", "commit"):
        raise ModelNotFoundError(f"{url}: is a page about {repo}; give {repo}")
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
        if "/" in name:
            hint = f"; of a repository on the Hub, give the id alone: {name.removeprefix('hf-hub:')}"
        raise ModelNotFoundError(
            f"timm:{name}: timm has no pretrained model of that name"
            f"{hint or '; timm.list_pretrained() in Python lists them'}"
        )
    if not cfg.hf_hub_id:
        raise ModelNotFoundError(_not_on_the_hub("timm", name, str(cfg.url or "")))
    return f"timm/{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id


def _open_clip_repo(name: str) -> str:
    import open_clip

    architecture, _, tag = name.partition("/")
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not cfg:
        known = [f"{arch}/{t}" for arch, t in open_clip.list_pretrained()]
        hint = did_you_mean(name, known) or "; of a repository on the Hub, give the id alone, and --library open_clip"
        raise ModelNotFoundError(f"open_clip:{name}: open_clip has no such model and tag{hint}")
    if not cfg.get("hf_hub"):
        raise ModelNotFoundError(_not_on_the_hub("open_clip", name, str(cfg.get("url") or "")))
    return cfg["hf_hub"].rstrip("/")


def _not_on_the_hub(library: str, name: str, url: str) -> str:
    """The message for a model whose weights a library fetches from elsewhere."""
    where = f"download {url}, and give the file with --arch {library}:{name}" if url else "give a folder or a file"
    return f"{library}:{name}: {library} names no Hub repository for it; {where}"


def downloaded(place: HubPlace, model_id: str, library: str | None, *, pickles: bool) -> tuple[Path, str]:
    """The repository's files for one checkpoint: at its top, or in its subfolder; and the commit.

    Of folders inside only the configs are fetched, for the message that says which of them to ask for. If the
    `library` is known, the weights of others stay there.
    """
    weights = ["*.safetensors", *(PICKLES if pickles else ())]
    below = "" if place.subfolder is None else f"{place.subfolder}/"
    wanted = [f"{below}{kind}" for kind in (*CONFIGS, *weights)]
    ignored = [] if below else [f"*/{kind}" for kind in weights]
    ignored += [f"{below}{kind}" for kind in OF_OTHERS.get(library or "", ())]
    return snapshot(place.repo, model_id, place.revision, wanted, ignored)


def config_folder(name: str, options: LoadOptions) -> Path:
    """The folder with the config of `--arch transformers:NAME`, a Hub id; no weights are fetched.

    Raises:
        ModelNotFoundError: there is no such repository, or it cannot be reached.
    """
    place = hub_place(name)
    return snapshot(place.repo, f"--arch transformers:{name}", place.revision, CONFIGS, ["*/*"])[0]
