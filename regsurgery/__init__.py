"""regsurgery: rewrite Vision Transformer checkpoints so that outlier tokens are gone.

Public API: `doctor`, `find`, `find_part`, `patch`, `verify`, `evaluate`, `observe`, `plot_norms`, `plot_norm_maps`,
`plot_attention`, `plot_shift_maps`, `report`, `unpatch`, `reproduce`, `diff`, `load`, `push`, `find_recipe`,
`Recipe`. Importing the package is cheap; torch and the model libraries are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Recipe",
    "__version__",
    "diff",
    "doctor",
    "evaluate",
    "find",
    "find_part",
    "find_recipe",
    "load",
    "observe",
    "patch",
    "plot_attention",
    "plot_norm_maps",
    "plot_norms",
    "plot_shift_maps",
    "push",
    "report",
    "reproduce",
    "unpatch",
    "verify",
]

if TYPE_CHECKING:
    from regsurgery.evaluation import evaluate
    from regsurgery.evaluation.observed import observe
    from regsurgery.hub import push
    from regsurgery.patched import load
    from regsurgery.pipeline import doctor, find, find_part, patch, verify
    from regsurgery.plots import plot_attention, plot_norm_maps, plot_norms, plot_shift_maps
    from regsurgery.recipe import Recipe, find_recipe
    from regsurgery.reporting import report
    from regsurgery.reproducing import reproduce
    from regsurgery.restoring import unpatch
    from regsurgery.tensor_diff import diff

_WHERE = {
    "doctor": "pipeline",
    "find": "pipeline",
    "find_part": "pipeline",
    "patch": "pipeline",
    "verify": "pipeline",
    "evaluate": "evaluation",
    "observe": "evaluation.observed",
    "plot_norms": "plots",
    "plot_shift_maps": "plots",
    "plot_norm_maps": "plots",
    "plot_attention": "plots",
    "unpatch": "restoring",
    "report": "reporting",
    "reproduce": "reproducing",
    "diff": "tensor_diff",
    "load": "patched",
    "push": "hub",
    "Recipe": "recipe",
    "find_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'regsurgery' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"regsurgery.{_WHERE[name]}"), name)
