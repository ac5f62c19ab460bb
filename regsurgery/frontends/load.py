"""MODEL -> `Loaded`: find the checkpoint, identify its library, load it, and keep what later steps need."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from regsurgery.checkpoints.download import published_sha256
from regsurgery.checkpoints.limits import refuse_links_out
from regsurgery.checkpoints.owned import OwnedFolder
from regsurgery.checkpoints.reading import index_of, weight_files
from regsurgery.checkpoints.safetensors_file import SafetensorsFile, read_header
from regsurgery.checkpoints.sums import combined_digest
from regsurgery.checkpoints.watched import Watched
from regsurgery.checkpoints.weights_check import check_shards, finite_digests
from regsurgery.errors import CheckpointError, UnsupportedModelError, UserError
from regsurgery.formats import WEIGHTS_NAMES
from regsurgery.frontends.bounds import bounded_model, check_numbers, tried
from regsurgery.frontends.config import read_config
from regsurgery.frontends.conversion.arch import Arch
from regsurgery.frontends.conversion.files import convert_file, is_renamed
from regsurgery.frontends.conversion.layout import weights_file
from regsurgery.frontends.device import check_device
from regsurgery.frontends.found import Found, check_length, find_checkpoint
from regsurgery.frontends.libraries import frontend
from regsurgery.frontends.loaded import Checkpoint, Loaded, Source
from regsurgery.frontends.model_id import repository_of
from regsurgery.options import LoadOptions

QUANTISED = ("I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # dtypes of quantised matrices


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
    """Load MODEL: a folder, a weights file, a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`.

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
    origin = Path(model_id, options.subfolder or "")  # not there if it is yet to be downloaded
    check_length(origin)
    files = Watched.folder(origin) if model_id and origin.is_dir() else Watched.of([origin])
    with files.blamed():
        found = find_checkpoint(model_id, options, load)
        library, config_name, config = read_config(found.folder, found.library)
        if not native:  # a native folder is a patched one, already checked, or our own link to it
            _refuse_patched(found.folder, config)
        check_numbers(found.folder / config_name, config)
        found, headers = _with_plain_weights(found, library, config_name, model_id, options)
    if found.folder != origin:
        files = files.beside(Watched.folder(found.folder))
    folder, converted = found.folder, found.converted
    with files.unchanged(), nullcontext() if converted is None else converted.named(folder):
        headers = _headers(folder, library) if headers is None else headers
        weights = tuple(header.path for header in headers)
        check_shards(folder, WEIGHTS_NAMES[library], headers)
        _refuse_quantised(folder, config, headers)
        if use_meanwhile is not None:
            use_meanwhile(weights)
        digests = _known(weights, known) or (None if look_through else _published(weights)) or finite_digests(headers)
        source = _source(model_id, found, digests, options)
        _check_sha256(source, model_id if scratch is None else options.called, options)
        files = files.knowing(dict(zip(weights, digests, strict=True)))
        stored = sum(path.stat().st_size for path in weights) > _memory(options)
        home = scratch or found.home
        checkpoint = Checkpoint(source, library, folder, weights, digests, config, config_name, stored, home, files)
        with bounded_model(folder / config_name, headers):
            loaded = frontend(library).load(checkpoint, options)
        tried(loaded)
    return loaded if options.tower is None else loaded.at_tower(options.tower)


def _with_plain_weights(
    found: Found, library: str, config_name: str, model_id: str, options: LoadOptions
) -> tuple[Found, list[SafetensorsFile] | None]:
    """The checkpoint with its weights as safetensors, by names that a patched folder can have; their headers, unless
    the files are new.
    """
    headers = _headers(found.folder, library)
    file = _to_convert(found.folder, library, config_name, headers)
    if file is not None:
        made = convert_file(file, options, Arch(library, str(found.folder), config_name))
        return replace(found, folder=made.folder, converted=made.converted, home=made.home), None
    if options.ema and found.converted is None:
        raise UserError(f"--ema: {model_id} holds one set of weights; leave it out")
    return found, headers


def _headers(folder: Path, library: str) -> list[SafetensorsFile]:
    return [read_header(path) for path in weight_files(folder, WEIGHTS_NAMES[library])]


def _to_convert(folder: Path, library: str, config_name: str, headers: Sequence[SafetensorsFile]) -> Path | None:
    """The weights of a folder that are not safetensors with names that a patched folder can have; None: they are."""
    weights = [header.path for header in headers]
    if not weights:
        return weights_file(folder, library)
    with bounded_model(folder / config_name, headers):
        renamed = is_renamed(library, folder, [tensor.name for header in headers for tensor in header.tensors])
    if not renamed:
        return None
    return weights[0] if len(weights) == 1 else index_of(weights)


def _source(model_id: str, found: Found, digests: Sequence[str], options: LoadOptions) -> Source:
    repo = found.repo
    if options.called is not None:
        repo = None if found.revision is None else repository_of(options.called)
    return Source(
        options.called or model_id, found.revision, combined_digest(digests), repo, options.reading, found.converted
    )


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
