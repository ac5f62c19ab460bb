"""The options and arguments that commands share, as annotated types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from regsurgery import completion

Model = Annotated[
    str,
    typer.Argument(
        help="Folder, Hub id, timm:NAME, open_clip:ARCH/TAG, or demo.",
        show_default=False,
        autocompletion=completion.models,
    ),
]
Patched = Annotated[Path, typer.Argument(help="Folder that regsurgery patch wrote.", show_default=False)]
OutputFolder = Annotated[Path, typer.Option("--output", "-o", help="New folder to write.")]
Images = Annotated[
    Path | None,
    typer.Option(
        "--images",
        help="Folder of images, parquet or arrow files, or WebDataset tars (default: generated dead-leaves pictures).",
    ),
]
NumImages = Annotated[int | None, typer.Option("--num-images", help="Maximum number of images.", min=1)]
NumRegisters = Annotated[
    int | None,
    typer.Option(
        "--num-registers", help="Number of register tokens (default: the number that changes the outputs least).", min=1
    ),
]
Smallest = Annotated[
    bool,
    typer.Option("--smallest", help="Use the smallest set of neurons and one register (the paper's setting)."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", help="Side of the square images in pixels (default: the model's own).", min=1),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed for generated pictures and random controls.")]
Force = Annotated[bool, typer.Option("--force", help="Search even if the model was trained with registers.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe file, or the name of a bundled recipe.", autocompletion=completion.recipes),
]
Mode = Annotated[
    str | None,
    typer.Option("--mode", help="shift, native or bias (default: the recipe's).", autocompletion=completion.modes),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="transformers, timm, open_clip, pt2 or onnx.", autocompletion=completion.formats),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Where the model runs: auto (accelerate), cuda, ... (default: CPU).",
        autocompletion=completion.devices,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="Leave the weights of larger checkpoints on disk, e.g. 8GB (default: half of the free memory).",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail if the verdict has warnings or rests on too few images.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors, and the output of --json.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (weights_only).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Visibility of a new repository (default: account setting).")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of MODEL.")]
