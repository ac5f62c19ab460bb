"""MODEL, as users write it -> a loaded, traced and matched model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.errors import UnsupportedModelError
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded
from regsurgery.frontends.model_id import DEMO
from regsurgery.garbage import objects_stay
from regsurgery.options import LoadOptions
from regsurgery.progress import Progress

if TYPE_CHECKING:
    from regsurgery.compiler.located import Located


def open_model(
    model: str,
    options: LoadOptions,
    image_size: int | None = None,
    check: Callable[[Loaded], None] = lambda loaded: None,
    **how: Any,
) -> Located:
    """Load -> trace -> match, at `image_size` pixels if given.

    Args:
        check: is called with the loaded model, so that what cannot work is refused before the trace.
        how: of `frontends.load.load`.

    Raises:
        UserError: as of `frontends.load.load`, or the model takes no such images.
        UnsupportedModelError: the model has no sites.
    """
    from regsurgery.frontends.image_size import at_image_size

    options.progress.stage("load")
    with objects_stay():
        loaded = at_image_size(load_model(model, options, **how), image_size)
        check(loaded)
        try:
            return locate(loaded, options.progress)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(
                f"{loaded.source.id}: {error}; regsurgery families lists what is supported"
            ) from error


def load_model(model: str, options: LoadOptions, **how: Any) -> Loaded:
    """`frontends.load.load`, or the demo, which is made here."""
    if model != DEMO:
        return load(model, options, **how)
    from regsurgery.demo import write_demo

    with scratch_folder() as scratch:
        folder = scratch.path / DEMO
        write_demo(folder)
    named = replace(options, called=options.called or DEMO, revision=None)
    return load(str(folder), named, scratch=scratch, **how)


def locate(loaded: Loaded, progress: Progress, image_size: tuple[int, int] | None = None) -> Located:
    """Trace -> match, at `image_size` (height, width) if given."""
    from regsurgery.compiler.located import Located
    from regsurgery.compiler.match import match
    from regsurgery.compiler.placement import beside_trained, trained_registers
    from regsurgery.compiler.trace import trace

    progress.stage("trace")
    traced = trace(loaded, image_size)
    progress.stage("match")
    sites = match(traced)
    return Located(loaded, traced, beside_trained(sites, trained_registers(loaded, sites)))
