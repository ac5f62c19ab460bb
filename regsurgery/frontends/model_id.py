"""Hub ids, `timm:NAME` and `open_clip:ARCH/TAG` -> the folder that the Hub client downloaded."""

from __future__ import annotations

from pathlib import Path

from regsurgery.checkpoints.download import snapshot
from regsurgery.errors import ModelNotFoundError, did_you_mean
from regsurgery.options import LoadOptions

DEMO = "demo"


def repository_of(model_id: str) -> str:
    """The Hub repository of a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`."""
    prefix, _, name = model_id.partition(":")
    if prefix == "timm":
        return _timm_repo(name)
    if prefix == "open_clip":
        return _open_clip_repo(name)
    if not model_id.strip():
        raise ModelNotFoundError("MODEL is empty; give a folder, a Hub id, timm:NAME, open_clip:ARCH/TAG or demo")
    if Path(model_id).is_file():
        raise ModelNotFoundError(f"{model_id}: is a file; give the folder that holds the checkpoint")
    return model_id


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


def downloaded(repo: str, model_id: str, options: LoadOptions) -> tuple[Path, str | None]:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md", "LICENSE*"]
    pickles = ["*.bin", "*.pt", "*.pth"] if options.allow_pickle else []
    return snapshot(repo, model_id, options.revision, patterns + pickles)
