"""Native mode in open_clip: the vision tower becomes timm's with `reg_tokens`, the rest is unchanged.

open_clip identifies a timm tower only by name, so the name points to the folder itself (`local-dir:...`, or the Hub
repository after a push), where timm's config.json defines the tower.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from regsurgery.backends import native_timm
from regsurgery.backends.canonical import TRUNK, canonical, config_block
from regsurgery.backends.native_timm import tower_tensors, write_config
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.whole import temporary_folder
from regsurgery.checkpoints.writing import write_json, write_tensors
from regsurgery.errors import UnsupportedModelError, library_fails
from regsurgery.formats import WEIGHTS_NAMES, Snippets
from regsurgery.frontends.open_clip import UNLOADABLE, stored_model
from regsurgery.runtime.open_clip import stock_model

if TYPE_CHECKING:
    from regsurgery.compiler.surgery import Surgery
    from regsurgery.frontends.loaded import Loaded

WEIGHTS_NAME = WEIGHTS_NAMES["open_clip"]
CONFIG_NAME = "open_clip_config.json"
SNIPPET = """\
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{folder}")
"""
FEATURES = """\
import open_clip
import torch
from PIL import Image

model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")
photo = Image.new("RGB", (640, 480))  # or Image.open("photo.jpg")
with torch.no_grad():
    features = model.eval().encode_image(preprocess(photo).unsqueeze(0))
"""


def check(loaded: Loaded, num_registers: int) -> None:
    """Raise `UnsupportedModelError` if open_clip cannot hold the model; asked before any fitting."""
    if loaded.library != "open_clip":
        raise UnsupportedModelError(
            f"native mode: an open_clip folder needs a text tower, and {loaded.source.id} has none that open_clip "
            "knows; use --format timm or transformers"
        )
    native_timm.check(loaded, num_registers)


def emit(surgery: Surgery, folder: Path, target: Path) -> None:
    """Write open_clip's config, timm's config for the tower, and the weights; the text tower passes through."""
    state = surgery.state()
    tower = canonical(surgery.loaded, state)
    tensors = {name: value for name, value in state.items() if not name.startswith("visual.")}
    tensors |= {TRUNK + name: value for name, value in tower_tensors(tower, surgery.register_tokens).items()}
    write_tensors(folder / WEIGHTS_NAME, tensors)
    write_config(surgery, tower, folder)
    config = json.loads(json.dumps(surgery.loaded.config))
    vision = config["model_cfg"]["vision_cfg"]
    config["model_cfg"]["vision_cfg"] = {
        "image_size": vision.get("image_size", list(tower.image_size)),
        "timm_model_name": f"local-dir:{target.absolute()}",
        "timm_model_pretrained": False,
        "timm_pool": tower.model_args.get("global_pool", "token"),
        "timm_proj": None,
    }
    write_json(folder / CONFIG_NAME, {**config, "regsurgery": config_block(surgery, tower)})


def snippets(surgery: Surgery, folder: str) -> Snippets:
    return (
        ("open_clip, unmodified", SNIPPET.format(folder=folder)),
        ("Features of a photo", FEATURES.format(folder=folder)),
    )


def reload(folder: Path, config: dict[str, Any], *, trusted: bool = False, stored: bool = False) -> nn.Module:
    """The model of `folder` as stock open_clip loads it, wherever it has moved; `stored`: its weights stay on disk."""
    import open_clip

    with temporary_folder() as scratch:
        relocate(folder, scratch, config)
        try:
            if stored:
                return stored_model(scratch, weight_files(folder, WEIGHTS_NAME)).eval()
            model: Any = stock_model(scratch)
            open_clip.load_checkpoint(model, str(folder / WEIGHTS_NAME), strict=True)
        except UNLOADABLE as error:
            raise library_fails("open_clip", folder, error) from error
    return model.eval()


def relocate(folder: Path, scratch: Path, config: dict[str, Any]) -> None:
    """Write to `scratch` the config of `folder` with its present path, and a link to its weights."""
    moved = json.loads(json.dumps(config))
    moved["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{folder.absolute()}"
    moved.pop("regsurgery", None)
    write_json(scratch / CONFIG_NAME, moved)
    (scratch / WEIGHTS_NAME).symlink_to((folder / WEIGHTS_NAME).absolute())


def outputs(model: Any, images: Tensor, num_registers: int) -> dict[str, Tensor]:
    """What the kinds of `Canonical.outputs` are here."""
    return {"head": model.encode_image(images)}


def foreign_code(folder: Path) -> str | None:
    """A stock checkpoint has no code."""
    return None
