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
        "--images", help="Folder of images, parquet or arrow files or WebDataset tars; dead-leaves pictures by default."
    ),
]
NumImages = Annotated[int | None, typer.Option("--num-images", help="At most that many images.", min=1)]
NumRegisters = Annotated[
    int | None,
    typer.Option("--num-registers", help="Number of register tokens; by default as many as drift least.", min=1),
]
Smallest = Annotated[
    bool,
    typer.Option("--smallest", help="Find the smallest set of neurons, with one register (the paper's setting)."),
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", help="Side of the (square) images in pixels; by default the model's own.", min=1),
]
Seed = Annotated[int, typer.Option("--seed", help="Of generated pictures and random controls.")]
Force = Annotated[bool, typer.Option("--force", help="Also find in a model that was trained with registers.")]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe file, or name of a bundled recipe.", autocompletion=completion.recipes),
]
Mode = Annotated[
    str | None,
    typer.Option("--mode", help="shift, native or bias; by default the recipe's.", autocompletion=completion.modes),
]
Format = Annotated[
    str | None,
    typer.Option("--format", help="transformers, timm, open_clip, pt2 or onnx.", autocompletion=completion.formats),
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        "--device-map",
        help="Where the model runs: auto (accelerate), cuda, ...; CPU by default.",
        autocompletion=completion.devices,
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        help="8GB: weights of larger checkpoints stay on disk; half of what is free by default.",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail where the verdict has warnings or too few images.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors, and what --json prints.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights (weights_only).")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that the source checkpoint brings.")
]
Private = Annotated[
    bool | None, typer.Option("--private/--public", help="Of a repository that is created; as your account has it.")
]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub revision of MODEL.")]
