"""MODEL -> `Loaded`: find the checkpoint, tell its library by its config file, load it, keep what later steps need."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery import checkpoint_io, limits, weights_check
from regsurgery.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError, UserError, did_you_mean
from regsurgery.hub_files import published_sha256, snapshot

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor, nn

DEMO = "demo"
QUANTISED = ("I8", "U8", "F8_E4M3", "F8_E5M2")  # dtypes of quantised matrices
CONFIG_NAMES = ("open_clip_config.json", "config.json")


@dataclass(frozen=True)
class Source:
    """Where a checkpoint came from.

    Attributes:
        id: MODEL as the user gave it; `repo` is the Hub repository behind it, if there is one.
        revision: the Hub commit.
        sha256: of its weight file; of its files' digests in name order where there are several.
    """

    id: str
    revision: str | None
    sha256: str
    repo: str | None = None

    @property
    def name(self) -> str:
        """What a recipe calls the model: its Hub repository, the name of its folder, or `demo`."""
        return self.repo or Path(self.id).absolute().name

    def as_dict(self) -> dict[str, Any]:
        """The `source` entry of a patched config; `repo` is there where `id` does not say it."""
        repo = {} if self.repo in (None, self.id) else {"repo": self.repo}
        return {"id": self.id, **repo, "revision": self.revision, "sha256": self.sha256}


@dataclass(frozen=True)
class Checkpoint:
    """The files of a model, checked but not loaded.

    Attributes:
        library: `transformers`, `timm` or `open_clip`.
        folder: the checkpoint folder; read only. `scratch` keeps it alive where it is a temporary one.
        weights: its safetensors files.
        digests: the sha256 of each of `weights`.
        pickled: the pickle that `weights` were converted from, where they were.
        config: the library's own config file, parsed; `config_name` is that file's name.
        stored: the weights are to stay on disk, see `stored.py`.
    """

    source: Source
    library: str
    folder: Path
    weights: tuple[Path, ...]
    digests: tuple[str, ...]
    pickled: Path | None
    config: Mapping[str, Any]
    config_name: str
    stored: bool
    scratch: tempfile.TemporaryDirectory[str] | None


@dataclass(frozen=True)
class Loaded(Checkpoint):
    """A model ready for tracing, and the files it came from.

    Attributes:
        architecture: class or entry-point name, as the config has it.
        model: the stock model in the checkpoint's dtype, in eval mode; on the CPU if no device map was given.
        image_size: (height, width) in pixels that the model was made for.
        preprocess: the model's own preprocessing, images -> `[B, 3, height, width]` in the model's dtype.
        preprocess_at: (height, width) -> the same preprocessing for that image size: what is cut off keeps its share.
        preprocess_note: one line that says where the preprocessing comes from.
        inputs: images `[B, 3, H, W]` -> (args, kwargs) of the model's forward; a text tower gets a dummy text.
        name_outputs: what forward returns -> its tensors by name.
        disk_name: name of a parameter in memory -> its name in the checkpoint file; None where the file has no tensor
            of its own for it (a part of a fused one).
        entry: path of the module that is traced and called, "" for the whole model; a vision tower inside a model that
            cannot be traced whole.
        own: the same checkpoint at the size that it was made for, where `image_size` is another one.
    """

    architecture: str
    model: nn.Module
    image_size: tuple[int, int]
    preprocess: Callable[[list[Image]], Tensor]
    preprocess_at: Callable[[tuple[int, int]], Callable[[list[Image]], Tensor]]
    preprocess_note: str
    inputs: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]
    name_outputs: Callable[[Any], dict[str, Tensor]]
    disk_name: Callable[[str], str | None]
    entry: str = ""
    own: Loaded | None = None

    def resized(self, model: nn.Module, size: tuple[int, int]) -> Loaded:
        """The checkpoint as `model`, which takes images of another size (height, width), preprocessed for it."""
        note = f"{(self.own or self).preprocess_note}, at {size[0]}x{size[1]} pixels"
        return replace(
            self,
            model=model,
            image_size=size,
            preprocess=self.preprocess_at(size),
            preprocess_note=note,
            own=self.own or self,
        )

    def call(self, model: nn.Module, images: Tensor) -> dict[str, Tensor]:
        """Run `model`, a stock or patched model of this checkpoint's kind, on `images` `[B, 3, H, W]`."""
        args, kwargs = self.inputs(images)
        return self.name_outputs(model.get_submodule(self.entry)(*args, **kwargs))


@dataclass(frozen=True)
class LoadOptions:
    """What the user allows while loading.

    Attributes:
        device_map: where the model goes, as accelerate has it: `auto`, or a device such as `cuda`; the CPU by default.
        max_memory: bytes; the weights of a larger checkpoint stay on disk and are read operator by operator. By default
            half of what the machine has free.
        sha256: what `Source.sha256` must be; anything by default.
        called: what the model is called in what is written; by default as it was given.
    """

    allow_pickle: bool = False
    trust_remote_code: bool = False
    revision: str | None = None
    device_map: str | None = None
    max_memory: int | None = None
    sha256: str | None = None
    called: str | None = None


def load(
    model_id: str,
    options: LoadOptions | None = None,
    *,
    native: bool = False,
    look_through: bool = True,
    use_meanwhile: Callable[[Sequence[Path]], None] | None = None,
) -> Loaded:
    """Load MODEL: a folder, a Hub id, `timm:NAME`, `open_clip:ARCH/TAG`, or `demo`.

    Args:
        native: MODEL is a folder of native mode, a stock checkpoint; others that are patched are refused.
        look_through: read every weight, for the sha256 and to refuse NaN; without, files whose sha256 the Hub gave are
            taken to be what it published.
        use_meanwhile: is called with the weight files as soon as their headers are known to be fine.

    Raises:
        ModelNotFoundError: nothing answers to the id, or it cannot be reached.
        CheckpointError: the folder has no config, no (allowed) weights, or broken weights.
        UnsupportedModelError: the library does not know the architecture, or its weights are quantised.
    """
    options = options or LoadOptions()
    _check_device(options.device_map)
    scratch, repo = None, None
    if model_id == DEMO:
        from regsurgery.demo import write_demo

        with checkpoint_io.scratch_folder() as scratch:
            folder, revision = Path(scratch.name) / DEMO, None
            write_demo(folder)
    elif model_id and Path(model_id).is_dir():
        folder, revision = Path(model_id), options.revision
    else:
        repo = _repository(model_id)
        folder, revision = _snapshot(repo, model_id, options)

    from regsurgery import backends

    library, config_name, config = read_config(folder)
    if not native:  # there the folder is a patched one, checked already, or our own link to it
        limits.refuse_links_out(folder)
    if "regsurgery" in config and not native:
        raise CheckpointError(f"{folder}: is patched already; patch its source {_source_id(config)} instead")
    limits.check_numbers(folder / config_name, config)
    weights, folder, scratch, pickled = _weights(folder, library, options, scratch)
    headers = [checkpoint_io.read_header(path) for path in weights]
    weights_check.check_shards(folder, backends.WEIGHTS_NAMES[library], headers)
    _refuse_quantised(folder, config, headers)
    if use_meanwhile is not None:
        use_meanwhile(weights)
    digests = None if look_through else _published(weights)
    if digests is None:
        digests = weights_check.finite_digests(headers)
    if options.called is not None:
        repo = None if revision is None else _repository(options.called)
    source = Source(options.called or model_id, revision, _combined(digests), repo)
    if options.sha256 not in (None, source.sha256):
        raise CheckpointError(
            f"{model_id}: its weights have sha256 {source.sha256}, expected {options.sha256}: they were "
            "changed, or are another model's; get those back that are expected"
        )
    stored = sum(path.stat().st_size for path in weights) > _memory(options)
    checkpoint = Checkpoint(source, library, folder, weights, digests, pickled, config, config_name, stored, scratch)
    with limits.bounded_model(folder / config_name, headers):
        loaded = backends.library(library).load(checkpoint, options)
    limits.tried(loaded.preprocess, folder)
    return loaded


def _published(weights: Sequence[Path]) -> tuple[str, ...] | None:
    """The sha256 of each file as the Hub gave it, or None where it did not give all of them."""
    digests = [published_sha256(path) for path in weights]
    return None if None in digests else tuple(filter(None, digests))


def _source_id(config: Mapping[str, Any]) -> str:
    block = config["regsurgery"]
    source = block.get("source") if isinstance(block, dict) else None
    return str(source.get("id", ""))[:200] if isinstance(source, dict) else ""


def parse_size(text: str) -> int:
    """A number of bytes as people write it: 8GB, 500MB, 1.5GiB, 0.

    Raises:
        UserError: it is none.
    """
    from accelerate.utils.modeling import convert_file_size_to_int

    try:
        return int(text) if text.isdecimal() else convert_file_size_to_int(text)
    except ValueError as error:
        raise UserError(f"--max-memory {text}: not a size such as 8GB, 500MB or 1.5GiB") from error


def _memory(options: LoadOptions) -> int:
    """How many bytes of weights may be in memory."""
    if options.max_memory is not None:
        return options.max_memory
    import psutil

    return psutil.virtual_memory().available // 2


def _check_device(device_map: str | None) -> None:
    """Raise `UserError` for a device map that names no device of this machine."""
    if device_map is None or device_map == "auto":
        return
    import torch

    try:
        kind = torch.device(device_map).type
    except RuntimeError as error:
        raise UserError(f"device map {device_map}: not a device; give auto, cpu, cuda or cuda:1") from error
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    present = ["cpu", *([accelerator.type] if accelerator else [])]
    if kind not in present:
        raise UserError(f"device map {device_map}: torch sees no {kind} here; give auto or {' or '.join(present)}")


def place(model: nn.Module, device_map: str | None) -> nn.Module:
    """Put a loaded model where `device_map` says; over several devices through accelerate.

    Raises:
        UserError: no such device.
    """
    if device_map is None:
        return model
    import accelerate
    from torch import nn

    # The members of a list of blocks hold residual adds, whose operands must be on one device.
    lists = [module for module in model.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    whole = sorted({type(member).__name__ for members in lists for member in members})
    try:
        if device_map != "auto":
            return model.to(device_map)
        return accelerate.dispatch_model(model, accelerate.infer_auto_device_map(model, no_split_module_classes=whole))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"device map {device_map}: {' '.join(str(error).split())[:200]}") from error


def read_config(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """The library, config file name and parsed config of a checkpoint folder; see `Loaded`."""
    for name in CONFIG_NAMES:
        path = folder / name
        if not path.is_file():
            continue
        config = limits.read_json(path)
        if name == "open_clip_config.json":
            return "open_clip", name, config
        if "model_type" in config:
            return "transformers", name, config
        if isinstance(config.get("architecture"), str):
            return "timm", name, config
        raise CheckpointError(
            f"{path}: neither transformers ('model_type') nor timm ('architecture') wrote this config"
        )
    names = " or ".join(reversed(CONFIG_NAMES))
    raise CheckpointError(f"{folder}: no {names}; give a folder that transformers, timm or open_clip saved")


def _refuse_quantised(
    folder: Path, config: Mapping[str, Any], headers: Sequence[checkpoint_io.SafetensorsFile]
) -> None:
    """Rows of a quantised matrix share scales, so no neuron's column can be rewritten alone."""
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
            f"{folder}: its weights are quantised ({reason}); patch the checkpoint it was made from, in float32, "
            "bfloat16 or float16, and quantise the patched folder"
        )


def _weights(
    folder: Path, library: str, options: LoadOptions, scratch: tempfile.TemporaryDirectory[str] | None
) -> tuple[tuple[Path, ...], Path, tempfile.TemporaryDirectory[str] | None, Path | None]:
    """The safetensors files of a checkpoint, the folder they are in, its `scratch`, and the pickle behind them."""
    from regsurgery import backends

    single = backends.WEIGHTS_NAMES[library]
    weights = checkpoint_io.weight_files(folder, single)
    if weights:
        return tuple(weights), folder, scratch, None
    pickled = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        raise CheckpointError(f"{folder}: has a config but no weights; {single} is missing, download it again")
    if not options.allow_pickle:
        raise CheckpointError(
            f"{pickled[0]}: pickled weights can run code when loaded and are refused; convert them to safetensors, or "
            "pass --allow-pickle if you trust their author"
        )
    if len(pickled) > 1:
        raise CheckpointError(
            f"{folder}: has {len(pickled)} pickled weight files; merge them into one safetensors file"
        )
    with checkpoint_io.scratch_folder() as scratch:
        converted = Path(scratch.name) / "converted"
        _convert_pickle(pickled[0], folder, converted, single)
    return (converted / single,), converted, scratch, pickled[0]


def _convert_pickle(pickled: Path, folder: Path, converted: Path, single: str) -> None:
    """Copy `folder` to `converted` with the pickled weights as safetensors; pickle is read with weights_only."""
    import shutil

    import safetensors.torch

    from regsurgery.pickled import read_pickle

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


# --- ids that are not folders ---------------------------------------------------------------------------------------


def _repository(model_id: str) -> str:
    """The Hub repository of a Hub id, `timm:NAME` or `open_clip:ARCH/TAG`."""
    prefix, _, name = model_id.partition(":")
    if prefix == "timm":
        return _timm_repo(name)
    if prefix == "open_clip":
        return _open_clip_repo(name)
    if not model_id.strip():
        raise ModelNotFoundError(
            "the MODEL given is empty; give a folder, a Hub id, timm:NAME, open_clip:ARCH/TAG or demo"
        )
    if Path(model_id).is_file():
        raise ModelNotFoundError(f"{model_id}: a file; give the folder that holds the checkpoint")
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
        raise ModelNotFoundError(f"timm:{name}: timm publishes no Hub repository for it")
    return f"timm/{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id == "timm/" else cfg.hf_hub_id


def _open_clip_repo(name: str) -> str:
    import open_clip

    architecture, _, tag = name.partition("/")
    cfg = open_clip.get_pretrained_cfg(architecture, tag)
    if not cfg:
        known = [f"{arch}/{t}" for arch, t in open_clip.list_pretrained()]
        raise ModelNotFoundError(f"open_clip:{name}: open_clip has no such model and tag{did_you_mean(name, known)}")
    if not cfg.get("hf_hub"):
        raise ModelNotFoundError(f"open_clip:{name}: open_clip publishes no Hub repository for it")
    return cfg["hf_hub"].rstrip("/")


def _snapshot(repo: str, model_id: str, options: LoadOptions) -> tuple[Path, str | None]:
    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md", "LICENSE*"]
    pickles = ["*.bin", "*.pt", "*.pth"] if options.allow_pickle else []
    return snapshot(repo, model_id, options.revision, patterns + pickles)
