"""Imported once by the process that drills fork theirs from (`running.py`): what a run of `patch` imports."""

from __future__ import annotations

import importlib
import pkgutil

import torch
import torch.export
import transformers.models.vit.modeling_vit  # noqa: F401

import regsurgery

torch.set_num_threads(1)  # no other thread may run where a process forks
for module in pkgutil.walk_packages(regsurgery.__path__, "regsurgery."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
