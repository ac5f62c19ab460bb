"""Programs of `torch.export`, kept for the models of a test process that differ in nothing but their weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from regsurgery.frontends.loaded import Loaded

Export = Callable[[Loaded, tuple[Any, ...], dict[str, Any]], torch.export.ExportedProgram]


def exported_once(export: Export) -> Export:
    """`export`, which gives a model of the same structure, config, constants and inputs the program it made before.

    Parameters have only shapes in a program, and a traced graph takes its own copy of it.
    """
    programs: dict[Hashable, torch.export.ExportedProgram] = {}

    @functools.wraps(export)
    def once(loaded: Loaded, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.export.ExportedProgram:
        key = (_model(loaded), _inputs(args, kwargs))
        if key not in programs:
            programs[key] = export(loaded, args, kwargs)
        return programs[key]

    return once


def _model(loaded: Loaded) -> Hashable:
    model = loaded.model
    config = getattr(model, "config", None)
    return (
        loaded.library,
        loaded.entry,
        str(type(model)),
        repr(model),
        json.dumps(loaded.config, sort_keys=True, default=str),
        repr(config),
        getattr(config, "_attn_implementation", None),
        tuple((name, p.shape, p.dtype, str(p.device)) for name, p in model.named_parameters(remove_duplicate=False)),
        tuple((name, b.dtype, tuple(b.flatten().tolist())) for name, b in model.named_buffers(remove_duplicate=False)),
    )


def _inputs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
    leaves, spec = pytree.tree_flatten((args, kwargs))
    return repr(spec), tuple(
        (leaf.shape, leaf.dtype, str(leaf.device)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )
