"""regsurgery: rewrite Vision Transformer checkpoints so that outlier tokens are gone.

Public API: `doctor`, `find`, `find_part`, `patch`, `verify`, `check`, `still_patched`, `evaluate`, `observe`,
`plot_norms`, `plot_norm_maps`, `plot_attention`, `plot_shift_maps`, `report`, `unpatch`, `reproduce`, `diff`, `load`,
`push`, `survey`, `find_recipe`, `Recipe`. Importing the package is cheap; torch and the model libraries are imported
on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from regsurgery.version import __version__

__all__ = [
    "Recipe",
    "__version__",
    "check",
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
    "still_patched",
    "survey",
    "unpatch",
    "verify",
]

if TYPE_CHECKING:
    from regsurgery.commands.check import check
    from regsurgery.commands.diff import diff
    from regsurgery.commands.doctor import doctor
    from regsurgery.commands.find import find, find_part
    from regsurgery.commands.patch import patch
    from regsurgery.commands.reproduce import reproduce
    from regsurgery.commands.unpatch import unpatch
    from regsurgery.commands.verify import verify
    from regsurgery.evaluation.evaluate import evaluate
    from regsurgery.evaluation.observed import observe
    from regsurgery.evaluation.plots import plot_attention, plot_norm_maps, plot_norms, plot_shift_maps
    from regsurgery.hub.push import push
    from regsurgery.recipe import Recipe, find_recipe
    from regsurgery.reporting.report import report
    from regsurgery.surveying.survey import survey
    from regsurgery.verification.live import still_patched
    from regsurgery.verification.patched import load

_WHERE = {
    "doctor": "commands.doctor",
    "find": "commands.find",
    "find_part": "commands.find",
    "patch": "commands.patch",
    "verify": "commands.verify",
    "check": "commands.check",
    "evaluate": "evaluation.evaluate",
    "observe": "evaluation.observed",
    "plot_norms": "evaluation.plots",
    "plot_shift_maps": "evaluation.plots",
    "plot_norm_maps": "evaluation.plots",
    "plot_attention": "evaluation.plots",
    "unpatch": "commands.unpatch",
    "report": "reporting.report",
    "reproduce": "commands.reproduce",
    "diff": "commands.diff",
    "load": "verification.patched",
    "still_patched": "verification.live",
    "push": "hub.push",
    "survey": "surveying.survey",
    "Recipe": "recipe",
    "find_recipe": "recipe",
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'regsurgery' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"regsurgery.{_WHERE[name]}"), name)
