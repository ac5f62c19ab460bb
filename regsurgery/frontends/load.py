"""MODEL -> `Loaded`: find the checkpoint, identify its library, load it, and keep what later steps need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.download import published_sha256
from regsurgery.checkpoints.limits import refuse_links_out
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.reading import weight_files
from regsurgery.checkpoints.safetensors_file import SafetensorsFile, read_header
from regsurgery.checkpoints.watched import Watched
from regsurgery.checkpoints.weights_check import check_shards, finite_digests
from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.errors import CheckpointError, UnsupportedModelError
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.bounds import bounded_model, check_numbers, tried
from regsurgery.frontends.config import read_config
from regsurgery.frontends.device import check_device
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.loaded import Checkpoint, Loaded, Source
from regsurgery.frontends.model_id import downloaded, repository_of
from regsurgery.options import LoadOptions

QUANTISED = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # dtypes of quantised matrices


def load(
    model_id: str,
    options: LoadOptions | None = None,
    *,
    scratch: OwnedFolder | None = None,
    native: bool = False,
    look_through: bool = True,
    known: Mapping[str, str] | None = None,
    use_meanwhile: Callable[[Sequence[Path]], None] | None = None,
) -> Loaded:
    """Load MODEL: a folder, a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`.

    Args:
        scratch: the temporary folder that MODEL is in, which lives as long as the result.
        native: MODEL is a folder of native mode, a stock checkpoint; other patched folders are refused.
        look_through: read every weight, to hash it and to refuse NaN; otherwise, files whose sha256 the Hub published
            are trusted.
        known: name -> sha256 of files that were just written from a checkpoint that was checked: those weights are not
            read again.
        use_meanwhile: is called with the weight files as soon as their headers have been checked.

    Raises:
        ModelNotFoundError: nothing has this id, or it cannot be reached.
        CheckpointError: the folder has no config, no (allowed) weights, or broken weights, or changes meanwhile.
        UnsupportedModelError: the library does not know the architecture, or the weights are quantised.
        UserError: the model has no module `options.tower`.
    """
    options = options or LoadOptions()
    check_device(options.device_map)
    folder, revision, repo = _found(model_id, options)
    files = Watched.folder(folder)
    with files.unchanged():
        library, config_name, config = read_config(folder)
        if not native:  # a native folder is a patched one, already checked, or our own link to it
            _refuse_patched(folder, config)
        check_numbers(folder / config_name, config)
        given = model_id if scratch is None else options.called
        weights, folder, scratch, pickled = _weights(folder, library, options, scratch)
        headers = [read_header(path) for path in weights]
        check_shards(folder, WEIGHTS_NAMES[library], headers)
        _refuse_quantised(folder, config, headers)
        if use_meanwhile is not None:
            use_meanwhile(weights)
        digests = _known(weights, known) or (None if look_through else _published(weights)) or finite_digests(headers)
        source = Source(options.called or model_id, revision, _combined(digests), repo)
        _check_sha256(source, given, options)
        files = files.knowing(dict(zip(weights, digests, strict=True)))
        stored = sum(path.stat().st_size for path in weights) > _memory(options)
        checkpoint = Checkpoint(
            source, library, folder, weights, digests, pickled, config, config_name, stored, scratch, files
        )
        with bounded_model(folder / config_name, headers):
            loaded = frontend(library).load(checkpoint, options)
        tried(loaded)
    return loaded if options.tower is None else loaded.at_tower(options.tower)


def _found(model_id: str, options: LoadOptions) -> tuple[Path, str | None, str | None]:
    """The folder of MODEL, its Hub commit, and its repository on the Hub."""
    if model_id and Path(model_id).is_dir():
        folder, revision, repo = Path(model_id), options.revision, None
    else:
        repo = repository_of(model_id)
        folder, revision = downloaded(repo, model_id, options)
    if options.called is not None:
        repo = None if revision is None else repository_of(options.called)
    return folder, revision, repo


def _check_sha256(source: Source, given: str | None, options: LoadOptions) -> None:
    if options.sha256 not in (None, source.sha256):
        raise CheckpointError(
            f"{given}: its weights have sha256 {source.sha256}, expected {options.sha256}; give the checkpoint with "
            "the expected weights"
        )


def _known(weights: Sequence[Path], known: Mapping[str, str] | None) -> tuple[str, ...] | None:
    """The sha256 of each file from `known`, or None if some are not in it."""
    return None if known is None else _all(known.get(path.name) for path in weights)


def _published(weights: Sequence[Path]) -> tuple[str, ...] | None:
    """The sha256 of each file as published by the Hub, or None if some were not."""
    return _all(published_sha256(path) for path in weights)


def _all(digests: Iterable[str | None]) -> tuple[str, ...] | None:
    found = list(digests)
    return None if None in found else tuple(filter(None, found))


def _refuse_patched(folder: Path, config: Mapping[str, Any]) -> None:
    refuse_links_out(folder)
    if "regsurgery" in config:
        raise CheckpointError(f"{folder}: is already patched; patch its source {_source_id(config)} instead")


def _source_id(config: Mapping[str, Any]) -> str:
    block = config["regsurgery"]
    source = block.get("source") if isinstance(block, dict) else None
    return str(source.get("id", ""))[:200] if isinstance(source, dict) else ""


def _memory(options: LoadOptions) -> int:
    """How many bytes of weights may be in memory."""
    if options.max_bytes is not None:
        return options.max_bytes
    import psutil

    return psutil.virtual_memory().available // 2


def _refuse_quantised(folder: Path, config: Mapping[str, Any], headers: Sequence[SafetensorsFile]) -> None:
    """Rows of a quantised matrix share scales, so a neuron's column cannot be rewritten alone."""
    settings = config.get("quantization_config")
    matrices = (
        f"tensor {tensor.name!r} is {tensor.dtype}"
        for header in headers
        for tensor in header.tensors
        if tensor.dtype in QUANTISED and len(tensor.shape) == 2
    )
    method = settings.get("quant_method", "quantization_config") if isinstance(settings, dict) else None
    reason = method or next(matrices, None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{folder}: its weights are quantised ({reason}); patch the checkpoint before quantisation, in float32, "
            "bfloat16 or float16, and quantise the patched folder"
        )


def _weights(
    folder: Path, library: str, options: LoadOptions, scratch: OwnedFolder | None
) -> tuple[tuple[Path, ...], Path, OwnedFolder | None, Path | None]:
    """The safetensors files of a checkpoint, their folder, its `scratch`, and the pickle they were converted from."""
    from regsurgery.formats import WEIGHTS_NAMES

    single = WEIGHTS_NAMES[library]
    weights = weight_files(folder, single)
    if weights:
        return tuple(weights), folder, scratch, None
    pickled = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        raise CheckpointError(f"{folder}: has a config but no weights; {single} is missing, add it")
    if not options.allow_pickle:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights can run code when loaded and are refused; convert them to safetensors, or "
            "pass --allow-pickle if you trust their author"
        )
    if len(pickled) > 1:
        raise CheckpointError(
            f"{folder}: has {len(pickled)} pickled weight files; merge them into one safetensors file"
        )
    with scratch_folder() as scratch:
        converted = scratch.path / "converted"
        _convert_pickle(pickled[0], folder, converted, single)
    return (converted / single,), converted, scratch, pickled[0]


def _convert_pickle(pickled: Path, folder: Path, converted: Path, single: str) -> None:
    """Copy `folder` to `converted` with the pickled weights as safetensors; pickle is read with weights_only."""
    import shutil

    import safetensors.torch

    from regsurgery.checkpoints.pickled import read_pickle

    state = read_pickle(pickled)
    converted.mkdir()
    for path in folder.iterdir():
        if path.is_file() and path != pickled:
            shutil.copyfile(path, converted / path.name)
    safetensors.torch.save_file(
        {name: value.contiguous().clone() for name, value in state.items()},
        converted / single,
        metadata={"format": "pt"},
    )


def _combined(digests: Sequence[str]) -> str:
    import hashlib

    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
