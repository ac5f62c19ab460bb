"""A zero-shot classifier: the text tower of a CLIP model and a file of prompts.

The file has one class per line, in the order of the class indices; prompts of one class are separated by tabs, and
their embeddings averaged at unit length. Radford et al., Learning Transferable Visual Models From Natural Language
Supervision, arXiv 2103.00020, section 3.1.4.

Shape suffixes: P prompts, L text tokens, K classes, E embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from regsurgery.errors import UserError
from regsurgery.frontends.loaded import Loaded

TEXT_EMBEDDERS = {"open_clip": "encode_text", "transformers": "get_text_features"}  # methods of models that have one
IMAGE_EMBEDDINGS = ("image_embeds", "image_features")  # names in transformers and open_clip


@torch.no_grad()
def class_embeddings(loaded: Loaded, prompts: Path) -> Tensor:
    """Unit vectors of the classes, `[K, E]`.

    Raises:
        UserError: the file is not a list of prompts, or the model has no text tower.
    """
    try:
        lines = prompts.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{prompts}: cannot be read: {error}") from error
    classes = [[prompt.strip() for prompt in line.split("\t") if prompt.strip()] for line in lines]
    while classes and not classes[-1]:
        classes.pop()
    empty = next((number for number, of_class in enumerate(classes, 1) if not of_class), None)
    if not classes or empty is not None:
        where = f"line {empty} is" if empty else "is"
        raise UserError(f"{prompts}: {where} empty; write one class per line, several prompts separated by tabs")
    return torch.stack([F.normalize(_embedded(loaded, of_class).mean(dim=0), dim=-1) for of_class in classes])


def has_text_tower(loaded: Loaded) -> bool:
    """Whether the model embeds texts, as `class_embeddings` needs."""
    return hasattr(loaded.model, TEXT_EMBEDDERS.get(loaded.library, ""))


def _embedded(loaded: Loaded, prompts: list[str]) -> Tensor:
    """Unit embeddings of prompts, `[P, E]`, float32."""
    model: Any = loaded.model
    device = next(model.parameters()).device
    if not has_text_tower(loaded):
        raise UserError(f"{loaded.source.id}: has no text tower; leave out --prompts to use its own classes")
    if loaded.library == "open_clip":
        tokens_PL = _open_clip_tokenizer(loaded)(prompts).to(device)
        features_PE = model.encode_text(tokens_PL)
    else:
        from transformers import AutoTokenizer

        try:
            # Without a word on trust, transformers would ask at the terminal whether to run a tokenizer's code.
            tokenizer = AutoTokenizer.from_pretrained(loaded.folder, trust_remote_code=False)  # nosec B615 # a folder
        except (OSError, ValueError) as error:
            raise UserError(f"{loaded.source.id}: has no tokenizer for the prompts; add its files") from error
        encoded = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").to(device)
        features_PE = model.get_text_features(**encoded)
        features_PE = getattr(features_PE, "pooler_output", features_PE)
    return F.normalize(features_PE.float(), dim=-1)


def _open_clip_tokenizer(loaded: Loaded) -> Any:
    import open_clip

    return open_clip.get_tokenizer(f"local-dir:{loaded.folder}")


def zero_shot_logits(outputs: Mapping[str, Tensor], classes_KE: Tensor) -> Tensor | None:
    """Cosine between each image and each class, `[B, K]`; None if the outputs have no image embedding."""
    name = next((name for name in IMAGE_EMBEDDINGS if name in outputs), None)
    if name is None or outputs[name].shape[-1] != classes_KE.shape[-1]:
        return None
    return F.normalize(outputs[name].float(), dim=-1) @ classes_KE.T
