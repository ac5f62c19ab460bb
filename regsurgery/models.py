"""MODEL, as users write it -> a loaded, traced and matched model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regsurgery.checkpoints.whole import scratch_folder
from regsurgery.errors import LISTED, SeveralStreamsError, UnsupportedModelError, several
from regsurgery.frontends.load import load
from regsurgery.frontends.loaded import Loaded, inside
from regsurgery.frontends.model_id import DEMO
from regsurgery.garbage import objects_stay
from regsurgery.options import LoadOptions
from regsurgery.progress import Progress

NO_MATCH = "no match: "

if TYPE_CHECKING:
    from regsurgery.compiler.located import Located


def open_model(
    model: str | Path,
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
        loaded = load_model(model, options, **how)
        with loaded.files.blamed():
            loaded = at_image_size(loaded, image_size)
            check(loaded)
            try:
                return locate(loaded, options.progress)
            except SeveralStreamsError as error:
                raise SeveralStreamsError(f"{loaded.source.id}: {error}") from error
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{loaded.source.id}: {error}; {LISTED}") from error


def load_model(model: str | Path, options: LoadOptions, **how: Any) -> Loaded:
    """`frontends.load.load`, or the demo, which is made here."""
    if str(model) != DEMO:
        return load(str(model), options, **how)
    from regsurgery.demo import write_demo

    with scratch_folder() as scratch:
        folder = scratch.path / DEMO
        write_demo(folder)
    named = replace(options, called=options.called or DEMO, revision=None)
    return load(str(folder), named, scratch=scratch, **how)


def locate(loaded: Loaded, progress: Progress, image_size: tuple[int, int] | None = None) -> Located:
    """Trace -> match, at `image_size` (height, width) if given; of a model with a choice, its only tower that matches.

    Raises:
        UnsupportedModelError: nothing in the model has sites, or several towers have.
    """
    if len(loaded.entries) < 2:
        return _located(loaded, progress, image_size)
    found: dict[str, Located] = {}
    errors: list[UnsupportedModelError] = []
    for entry in loaded.entries:
        if any(inside(entry.path, tower) for tower in found):
            continue
        try:
            found[entry.path] = _located(loaded.entered(entry), progress, image_size)
        except SeveralStreamsError:
            raise
        except UnsupportedModelError as error:
            errors.append(error)
    if not found:  # what is wrong with a graph says more than that there is none
        raise next((error for error in reversed(errors) if str(error).startswith(NO_MATCH)), errors[0])
    if len(found) > 1:
        raise SeveralStreamsError(several(sorted(found)))
    return next(iter(found.values()))


def _located(loaded: Loaded, progress: Progress, image_size: tuple[int, int] | None) -> Located:
    from regsurgery.compiler.located import Located
    from regsurgery.compiler.match import match
    from regsurgery.compiler.placement import beside_trained, trained_registers
    from regsurgery.compiler.surgery import named
    from regsurgery.compiler.trace import trace

    progress.stage("trace")
    traced = trace(loaded, image_size)
    progress.stage("match")
    sites = match(traced, loaded.tower)
    return named(Located(loaded, traced, beside_trained(sites, trained_registers(loaded, sites))))
