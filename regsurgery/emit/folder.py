"""The last step: a patched folder, complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from regsurgery.backends.formats import backend
from regsurgery.checkpoints.reading import WEIGHT_SUFFIXES, index_of
from regsurgery.checkpoints.sums import SUMS_NAME, write_sums
from regsurgery.checkpoints.whole import whole_folder
from regsurgery.compiler.surgery import Surgery
from regsurgery.emit.card import model_card
from regsurgery.emit.picture import before_after
from regsurgery.emit.run_record import RUN_RECORD_NAME, write_run_record
from regsurgery.emit.source_card import CARD_NAME
from regsurgery.frontends.loaded import Loaded
from regsurgery.recipe import RECIPE_NAME
from regsurgery.verification.original import RECORD_NAME, write_record
from regsurgery.verification.size_drift import SizeDrifts
from regsurgery.verification.verdict import Verdict


@contextmanager
def emit(surgery: Surgery, target: Path, fmt: str) -> Iterator[Path]:
    """Write the patched checkpoint next to `target`; it becomes `target` if the block ends without an error.

    The block verifies the result and calls `complete` with the verdict.
    """
    with whole_folder(target) as folder:
        if fmt == surgery.loaded.library:
            _copy_side_files(surgery.loaded, folder)
        backend(fmt, surgery.recipe.kind).emit(surgery, folder, target)
        (folder / RECIPE_NAME).write_text(surgery.recipe.to_yaml(), "utf-8")
        yield folder


def complete(
    surgery: Surgery,
    folder: Path,
    fmt: str,
    verdict: Verdict | None,
    run: dict[str, Any],
    sizes: SizeDrifts | None = None,
) -> None:
    """Write the model card and its picture, which have the verdict's figures, the record of the `run` (see
    `run_record.py`), what undoing takes, and last SHA256SUMS.

    Raises:
        CheckpointError: the source changed since it was first read.
    """
    picture = None if verdict is None else before_after(verdict, folder)
    (folder / CARD_NAME).write_text(model_card(surgery, fmt, verdict, run, picture, sizes), "utf-8")
    write_run_record(folder, run, verdict, sizes)
    loaded, known = surgery.loaded, {}
    if not surgery.recipe.kind.stock and fmt == loaded.library:
        write_record(loaded, folder)
        if index_of(loaded.weights) is not None:  # shards are copied whole
            known = {path.name: digest for path, digest in zip(loaded.weights, loaded.digests, strict=True)}
    write_sums(folder, known)
    loaded.files.check()  # nothing of the source is read after this


def _copy_side_files(loaded: Loaded, folder: Path) -> None:
    """Tokenizer, preprocessor, label and licence files: everything in the source except weights and card.

    Further safetensors files that are not part of the model (a zero-shot head) are copied too. Files that appeared
    since the source was first read are not part of it.
    """
    source = loaded.folder
    weights = {path.name for path in source.glob("*.safetensors.index.json")}
    for path in sorted(source.iterdir()):
        if (
            not path.is_file()
            or path.name not in loaded.files.names
            or path.name in weights | {CARD_NAME, RECIPE_NAME, RECORD_NAME, RUN_RECORD_NAME}
        ):
            continue
        if path.suffix in WEIGHT_SUFFIXES - {".safetensors"} or path.name == SUMS_NAME:
            continue
        if path.suffix == ".safetensors" and path.name.startswith(("model", "open_clip", "pytorch_model")):
            continue
        shutil.copyfile(path, folder / path.name)
